"""What is written is read again, and diffusers loads it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddpm_core import NoiseSchedule, UNetConfig
from pipelines.interop import Portable, export_diffusers, is_diffusers, read_diffusers, write_diffusers
from pipelines.models import Model
from tests.conftest import tiny_spec
from tests.interop.interop_helpers import (
    DIGITS,
    SMALL,
    WEIGHTS,
    assert_equal_outputs,
    portable,
    saved,
    theirs,
)

pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar is")  # leading spacing, as in diffusers, starts below T

# There and back.


@pytest.mark.parametrize(
    "given",
    [
        lambda: portable(),
        lambda: portable(UNetConfig(channels=(16, 32), groups=8, image_channels=3, blocks=2, dropout=0.2), "x0"),
        lambda: portable(
            UNetConfig(**(SMALL.to_dict() | {"head_channels": None, "learned_variance": True})),
            "v",
            variance="learned_range",
            schedule=NoiseSchedule.cosine(100).rescale_zero_terminal(),
            clip_x0=False,
            spacing="trailing",
        ),
        lambda: portable(
            UNetConfig(
                **SMALL.to_dict()
                | {"norm_eps": 1e-6, "time_sine_first": True, "time_frequency_shift": 1, "asymmetric_downsample": True}
            ),
            schedule=NoiseSchedule.from_rates(50, 0.01, 0.99),
            dynamic_threshold=0.9,
            variance="large",
        ),
    ],
    ids=["eps", "x0", "v-learned", "published-flags"],
)
def test_what_is_written_is_read_again_and_loaded_by_diffusers(given: Callable[[], Portable], tmp_path: Path) -> None:
    before = given()
    write_diffusers(before, tmp_path / "out")
    after = read_diffusers(tmp_path / "out")
    assert after.config == before.config
    assert after.weights.keys() == before.weights.keys()
    assert all(torch.equal(after.weights[name], value) for name, value in before.weights.items())
    for name in ("predict", "variance", "image_size", "clip_x0", "dynamic_threshold", "spacing"):
        assert getattr(after, name) == getattr(before, name)
    torch.testing.assert_close(after.schedule.alpha_bar, before.schedule.alpha_bar, rtol=1e-11, atol=0)

    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert_equal_outputs(before.network(), pipeline.unet, 8)
    # As diffusers writes it again, it is the same model.
    pipeline.save_pretrained(tmp_path / "again")
    assert read_diffusers(tmp_path / "again").config == before.config


def test_a_model_is_exported_as_it_is_built(tmp_path: Path) -> None:
    spec = tiny_spec()
    given = portable(UNetConfig(channels=(16, 16), groups=8))
    model = Model(spec, safetensors.torch.save(dict(given.weights)), "no-data", "test", "none")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    digests = export_diffusers(model, tmp_path / "out")
    assert digests[WEIGHTS] == hashlib.sha256((tmp_path / "out" / WEIGHTS).read_bytes()).hexdigest()
    process, unet = model.build()
    assert is_diffusers(tmp_path / "out")
    assert not is_diffusers(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert_equal_outputs(unet, pipeline.unet, 8)
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod.double(), process.schedule.alpha_bar, rtol=2e-5, atol=0
    )
    assert pipeline.unet.config.sample_size == 8
    assert pipeline.scheduler.config.timestep_spacing == spec.sample.spacing
    assert sorted(os.listdir(tmp_path)) == ["out"]


# Schedules. float32 in diffusers: its alpha_bar is off by 1e-5 of itself where beta is near 1.


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": np.linspace(0.001, 0.3, 1000).tolist()},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained_betas", "zero-terminal"],
)
def test_schedules_are_those_of_diffusers(fields: dict[str, Any], tmp_path: Path) -> None:
    scheduler = DDPMScheduler(**fields)
    read = read_diffusers(saved(tmp_path, theirs(**DIGITS), scheduler)).schedule
    torch.testing.assert_close(read.alpha_bar.float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(read.signal_rate.float(), scheduler.alphas_cumprod.sqrt(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.cosine(),
        NoiseSchedule.sigmoid(400),
        NoiseSchedule.from_rates(100, 0.02, 0.98),
        NoiseSchedule.linear().rescale_zero_terminal(),
    ],
    ids=["cosine", "sigmoid", "rates", "zero-terminal"],
)
def test_any_schedule_of_ours_is_that_of_the_pipeline(schedule: NoiseSchedule, tmp_path: Path) -> None:
    write_diffusers(portable(predict="v", schedule=schedule), tmp_path / "out")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    assert len(scheduler.alphas_cumprod) == schedule.timesteps
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alpha_bar.float(), rtol=5e-5, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "fields"),
    [
        (DDPMScheduler(variance_type="fixed_small_log"), {"predict": "eps", "variance": "small"}),
        (DDPMScheduler(prediction_type="sample", clip_sample=False), {"predict": "x0", "clip_x0": False}),
        (DDIMScheduler(prediction_type="v_prediction"), {"predict": "v", "clip_x0": True}),
        (DDIMScheduler(timestep_spacing="trailing"), {"spacing": "trailing"}),
    ],
    ids=["log", "sample", "ddim-v", "trailing"],
)
def test_a_scheduler_is_read_in_our_words(scheduler: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    read = read_diffusers(saved(tmp_path, theirs(**DIGITS), scheduler))
    assert {name: getattr(read, name) for name in fields} == fields
