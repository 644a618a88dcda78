"""The sections of a spec: typed, frozen, each with its defaults in sight and every field's meaning under it."""

from pipelines.sections.base import NAME as NAME
from pipelines.sections.base import Section as Section
from pipelines.sections.data import Data as Data
from pipelines.sections.data import LocalCache as LocalCache
from pipelines.sections.diffusion import AlphaBars as AlphaBars
from pipelines.sections.diffusion import Betas as Betas
from pipelines.sections.diffusion import Constant as Constant
from pipelines.sections.diffusion import Cosine as Cosine
from pipelines.sections.diffusion import Diffusion as Diffusion
from pipelines.sections.diffusion import Linear as Linear
from pipelines.sections.diffusion import Quadratic as Quadratic
from pipelines.sections.diffusion import Rates as Rates
from pipelines.sections.diffusion import Sigmoid as Sigmoid
from pipelines.sections.model import Model as Model
from pipelines.sections.surroundings import RayCluster as RayCluster
from pipelines.sections.surroundings import Tracking as Tracking
from pipelines.sections.sweep import Sweep as Sweep
from pipelines.sections.train import P2 as P2
from pipelines.sections.train import MinSnr as MinSnr
from pipelines.sections.train import Plateau as Plateau
from pipelines.sections.train import Score as Score
from pipelines.sections.train import Train as Train
from pipelines.sections.train import Uniform as Uniform
from pipelines.sections.use import Evaluate as Evaluate
from pipelines.sections.use import Gates as Gates
from pipelines.sections.use import Sample as Sample
