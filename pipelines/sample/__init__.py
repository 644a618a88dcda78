"""Sampling in bulk: jobs of fixed chunks that survive kills, and what becomes of their images."""

from pipelines.sample.bulk import Studio, sample_job, sample_spec
from pipelines.sample.finish import Samples
from pipelines.sample.forms import other_forms, write_form
from pipelines.sample.read import holds_samples, read_samples
from pipelines.sample.singles import draw_trajectory, sample_images, trace

__all__ = [
    "Samples",
    "Studio",
    "draw_trajectory",
    "holds_samples",
    "other_forms",
    "read_samples",
    "sample_images",
    "sample_job",
    "sample_spec",
    "trace",
    "write_form",
]
