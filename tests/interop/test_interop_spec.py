"""What a folder says, in a spec's words: its network, its schedule by name where it has one, its own way to draw."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddpm_core import NoiseSchedule
from pipelines.build import build_config, build_schedule
from pipelines.interop import read_diffusers, spec_of, write_diffusers
from pipelines.spec import Spec
from tests.interop.interop_helpers import CIFAR10, DIGITS, NARROW, portable, saved, theirs

pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar is")


def said(folder: Path) -> Spec:
    return spec_of(read_diffusers(folder), str(folder))


def test_a_published_network_is_that_of_its_spec(tmp_path: Path) -> None:
    read = read_diffusers(saved(tmp_path, theirs(**CIFAR10 | NARROW), DDPMScheduler(variance_type="fixed_large")))
    spec = spec_of(read, str(tmp_path))
    assert build_config(spec.model, spec.data, spec.diffusion) == read.config
    assert (spec.model.norm_eps, spec.model.time_sine_first, spec.model.asymmetric_downsample) == (1e-6, True, True)
    assert (spec.data.image_size, spec.data.channels, spec.diffusion.variance) == (32, 3, "large")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (NoiseSchedule.linear(), {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (NoiseSchedule.quadratic(100, 0.001, 0.2), {"kind": "quadratic", "beta_start": 0.001, "beta_end": 0.2}),
        (NoiseSchedule.cosine(60), {"kind": "cosine", "s": 0.008}),
        (NoiseSchedule.sigmoid(60), "betas"),
        (NoiseSchedule.cosine(60).rescale_zero_terminal(), "alpha_bars"),
    ],
    ids=["linear", "quadratic", "cosine", "by-its-numbers", "zero-terminal"],
)
def test_a_schedule_is_said_by_name_where_it_has_one(schedule: NoiseSchedule, words: Any, tmp_path: Path) -> None:
    write_diffusers(portable(predict="v", schedule=schedule), tmp_path / "out")
    read, spec = read_diffusers(tmp_path / "out"), said(tmp_path / "out")
    fields = spec.diffusion.schedule.model_dump()
    assert (fields["kind"] if isinstance(words, str) else fields) == pytest.approx(words)  # the root is rounded
    built = build_schedule(spec.diffusion)
    if not spec.diffusion.zero_terminal:
        assert torch.equal(built.alpha_bar, read.schedule.alpha_bar)
    torch.testing.assert_close(built.alpha_bar, schedule.alpha_bar, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "expected"),
    [
        ("DDPMPipeline", DDPMScheduler(), ("ancestral", 1000)),
        ("DDPMPipeline", DDIMScheduler(), ("ddim", 1000)),
        ("DDIMPipeline", DDIMScheduler(), ("ddim", 50)),
        ("DDIMPipeline", DDPMScheduler(), ("ddim", 50)),  # which it makes a DDIMScheduler of
        ("DDIMPipeline", DDIMScheduler(30), ("ddim", 30)),
    ],
)
def test_a_folder_is_drawn_with_as_its_classes_say(
    pipeline: str, scheduler: Any, expected: tuple[str, int], tmp_path: Path
) -> None:
    saved(tmp_path, theirs(**DIGITS), scheduler)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    sample = said(tmp_path).sample
    assert (sample.sampler, sample.steps) == expected
    assert (sample.eta, sample.spacing) == (0, "leading")
    del index["scheduler"]  # its own file says what it is
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    assert said(tmp_path).sample == sample


def test_the_index_says_which_class_the_scheduler_is_loaded_as(tmp_path: Path) -> None:
    saved(tmp_path, theirs(**DIGITS), DDPMScheduler())
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path).scheduler, DDIMScheduler)
    assert said(tmp_path).sample.sampler == "ddim"


def test_classes_are_a_specs(tmp_path: Path) -> None:
    """Without a class for none, no label can be hidden."""
    spec = said(saved(tmp_path, theirs(**DIGITS, num_class_embeds=4)))
    assert (spec.model.classes, spec.model.null_class, spec.train.label_dropout) == (4, False, 0)
