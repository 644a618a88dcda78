"""A folder of diffusers' DDPMPipeline, read and written.

It holds `model_index.json` (the components' classes), `unet/` (`config.json` and the weights) and `scheduler/`
(`scheduler_config.json`: schedule, prediction, variance); the published DDPM ones have all files side by side.
"""

import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig
from pipelines.errors import UserError
from pipelines.interop.configs import VERSION, SchedulerFile, UNetFile, dump, dump_json, parse, read_json, told
from pipelines.interop.parameters import WEIGHTS, dump_weights, read_weights
from pipelines.store import Place, sha256

if TYPE_CHECKING:
    from pipelines.models import Model

INDEX = "model_index.json"
_CONFIG, _SCHEDULER = "config.json", "scheduler_config.json"
_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
_COMPONENTS = {"unet": ("UNet2DModel",), "scheduler": ("DDPMScheduler", "DDIMScheduler")}
_DDIM_STEPS = 50
"""That DDIMPipeline takes where it is not told; of DDPMPipeline it is 1000, which are all of the usual schedule."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Portable:
    """What such a folder says, in our terms."""

    config: UNetConfig
    weights: Mapping[str, Tensor]
    """Of UNet(config), under its names, float32."""
    schedule: NoiseSchedule
    predict: str
    variance: str
    image_size: int
    """Side of the square images, pixels."""
    clip_x0: bool = True
    dynamic_threshold: float | None = None
    spacing: str = "leading"
    sampler: str = "ancestral"
    """That its own pipeline draws by; "ddim" is meant with eta 0. Read, not written."""
    steps: int | None = None
    """That its own pipeline takes where it is not told; None for every timestep. Read, not written."""

    def process(self) -> GaussianDiffusion:
        """The diffusion process; ValueError where schedule, prediction and variance do not go together."""
        return GaussianDiffusion(self.schedule, predict=self.predict, variance=self.variance)

    def network(self) -> UNet:
        """The network with a copy of the weights, in evaluation mode."""
        with torch.device("meta"):
            unet = UNet(self.config, seed=None)
        unet.load_state_dict({name: value.clone() for name, value in self.weights.items()}, strict=True, assign=True)
        return unet.eval().requires_grad_(False)


def export_diffusers(model: "Model", out: str | os.PathLike[str]) -> dict[str, str]:
    """Write a model as a folder that `diffusers.DDPMPipeline.from_pretrained(out)` loads: see `write_diffusers`."""
    process, unet = model.build()
    if unet.config.num_classes is not None:
        warnings.warn(
            "DDPMPipeline gives its network no class, which this one needs: draw from the folder by `ddpm sample`, or "
            "call its UNet2DModel with class_labels in a loop of your own",
            stacklevel=2,
        )
    return write_diffusers(
        Portable(
            config=unet.config,
            weights=unet.state_dict(),
            schedule=process.schedule,
            predict=process.predict,
            variance=process.variance,
            image_size=model.spec.data.image_size,
            clip_x0=model.spec.sample.clip_x0,
            dynamic_threshold=model.spec.sample.dynamic_threshold,
            spacing=model.spec.sample.spacing,
        ),
        out,
    )


def write_diffusers(portable: Portable, out: str | os.PathLike[str]) -> dict[str, str]:
    """Write the folder `out`, whole or not at all; returns the sha256 of each file in it.

    UserError for predict "mean", which the format cannot say, for a schedule of which diffusers would draw NaN, and for
    what is there already and no empty folder. Sampler, steps, eta and guidance are not said: the DDPMPipeline that is
    written draws by ancestral sampling. It loads a network with classes too, but gives it no labels; UNet2DModel
    itself takes them, as `class_labels`.
    """
    config = portable.config
    scheduler = SchedulerFile.of(
        portable.schedule,
        portable.predict,
        portable.variance,
        portable.clip_x0,
        portable.dynamic_threshold,
        portable.spacing,
    )
    files = {
        f"unet/{_CONFIG}": dump(UNetFile.of(config, portable.image_size)),
        f"unet/{WEIGHTS}": dump_weights(config, portable.weights),
        f"scheduler/{_SCHEDULER}": dump(scheduler),
        INDEX: dump_json(
            {
                "_class_name": "DDPMPipeline",
                "_diffusers_version": VERSION,
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
        ),
    }
    _commit(Place.of(out), files)
    return {name: sha256(data) for name, data in files.items()}


def is_diffusers(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of a diffusers pipeline."""
    return (Path(folder) / INDEX).is_file()


def read_diffusers(folder: str | os.PathLike[str]) -> Portable:
    """Read a folder of diffusers' DDPMPipeline or DDIMPipeline: ours, or a published one.

    UserError, naming file and field, for what cannot be honoured, for pickled weights, and for weights that are not
    those of the configuration. A class embedding without our note of a null class is taken for classes alone.
    """
    root = Path(folder)
    pipeline, named = _classes(root / INDEX)
    unet_folder, scheduler_folder = (root / n if (root / n).is_dir() else root for n in ("unet", "scheduler"))
    unet_path, scheduler_path = unet_folder / _CONFIG, scheduler_folder / _SCHEDULER
    unet, scheduler = parse(UNetFile, unet_path), parse(SchedulerFile, scheduler_path)
    config = told(unet_path, unet.to_config)
    if config.learned_variance != (scheduler.variance == "learned_range"):
        raise UserError(
            f"{scheduler_path}: variance_type: {scheduler.variance_type} does not go with a network of "
            f"{unet.in_channels} channels in and {unet.out_channels} out"
        )
    scheduler_class = named.get("scheduler", scheduler.class_name)
    timesteps = scheduler.num_train_timesteps
    portable = Portable(
        config=config,
        weights=read_weights(unet_folder, config),
        schedule=told(scheduler_path, scheduler.to_schedule),
        predict=scheduler.predict,
        variance=scheduler.variance,
        image_size=told(unet_path, unet.image_size),
        clip_x0=scheduler.clip_sample or scheduler.thresholding,
        dynamic_threshold=told(scheduler_path, scheduler.dynamic_threshold),
        spacing=scheduler.timestep_spacing,
        sampler="ddim" if "DDIM" in (pipeline + scheduler_class) else "ancestral",
        steps=min(_DDIM_STEPS, timesteps) if pipeline == "DDIMPipeline" else None,
    )
    told(scheduler_path, portable.process)
    return portable


def _classes(path: Path) -> tuple[str, dict[str, str]]:
    """The pipeline's class of a `model_index.json`, and each component's. UserError for one that cannot be read."""
    index = read_json(path)
    if (pipeline := index.get("_class_name")) not in _PIPELINES:
        raise UserError(f"{path}: _class_name: {pipeline} cannot be read, only {' and '.join(_PIPELINES)}")
    classes = {}
    for name, component in index.items():
        if name.startswith("_"):
            continue
        if name not in _COMPONENTS:
            raise UserError(f"{path}: {name}: is not known here, a {pipeline} has {' and '.join(_COMPONENTS)}")
        if component not in [["diffusers", known] for known in _COMPONENTS[name]]:
            given = ".".join(map(str, component)) if isinstance(component, list) else component
            known = " and ".join(f"diffusers.{each}" for each in _COMPONENTS[name])
            raise UserError(f"{path}: {name}: {given} cannot be read, only {known}")
        classes[name] = component[1]
    return pipeline, classes


def _commit(place: Place, files: Mapping[str, bytes]) -> None:
    """Write files of a folder and of folders in it aside, then give it its name.

    The last file lies in the folder itself, whose entries are durable when that is written.
    """
    staged = place.path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        if place.list():
            raise FileExistsError
        for name, data in files.items():
            Place(staged / name).write(data)
        os.rename(staged, place.path)  # fails on all but an empty folder
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if place.exists() and (not place.path.is_dir() or place.list()):
            raise UserError(f"{place}: is there already and no empty folder; name another") from None
        raise UserError(f"{place}: cannot be written ({error.strerror}); name a folder that can") from None
