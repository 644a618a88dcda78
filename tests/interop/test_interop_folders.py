"""What is written is read again, and diffusers' own pipeline loads it and draws our images from it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise, sample
from pipelines.interop import Portable, export_diffusers, is_diffusers, read_diffusers, write_diffusers
from pipelines.models import Model
from tests.conftest import tiny_spec
from tests.interop.interop_helpers import (
    DIGITS,
    SMALL,
    WEIGHTS,
    assert_equal_outputs,
    draw,
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


# Images.


@cache
def trained(predict: str) -> Portable:
    """A network trained on the bundled digits for a second: enough for images that are neither noise nor flat."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    config, schedule = UNetConfig(channels=(16, 16), groups=8), NoiseSchedule.cosine()
    process, unet = GaussianDiffusion(schedule, predict=predict), UNet(config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        x0 = images[torch.randint(len(images), (64,), generator=generator)]
        t = torch.randint(1, process.timesteps + 1, (64,), generator=generator)
        optimizer.zero_grad()
        process.loss(unet, x0, t, torch.randn(x0.shape, generator=generator)).mean().backward()
        optimizer.step()
    return Portable(
        config=config,
        weights={name: value.detach() for name, value in unet.state_dict().items()},
        schedule=schedule,
        predict=predict,
        variance="small",
        image_size=8,
    )


SEEDS = [3, 1, 4, 15]


def keyed_noise() -> Iterator[Tensor]:
    """What `sample` draws: first the noise to start from, then that of each step."""
    keys, counter = [noise.key(seed, "sample") for seed in SEEDS], 0
    while True:
        yield noise.normal(keys, (1, 8, 8), counter=counter)
        counter += 1


def assert_within_a_grey_level(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ((images.clamp(-1, 1) + 1) / 2 for images in (ours, theirs))
    assert (ours - theirs).abs().max() <= 1 / 255
    assert theirs.std() > 0.1
    assert ((theirs > 0.02) & (theirs < 0.98)).float().mean() > 0.2  # not all clipped


def with_learned_variance(given: Portable) -> Portable:
    """The network with an output that chooses the variance at random, but no two pixels alike."""
    config = UNetConfig(**(given.config.to_dict() | {"learned_variance": True}))
    choice = 0.3 * draw(1, 16, 3, 3)
    weights = dict(given.weights)
    weights["conv_out.weight"] = torch.cat((weights["conv_out.weight"], choice))
    weights["conv_out.bias"] = torch.cat((weights["conv_out.bias"], torch.zeros(1)))
    return replace(given, config=config, weights=weights, variance="learned_range")


def drawn_by_diffusers(given: Portable, folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The images of its own pipeline, in -1..1, from our noise."""
    write_diffusers(given, folder)
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    draws = keyed_noise()
    for module in ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws))
    return 2 * pipeline(batch_size=len(SEEDS), num_inference_steps=steps, output_type="pt").images - 1


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_diffusers_own_pipeline_draws_our_images(
    predict: str, variance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(trained(predict), variance=variance)
    if variance == "learned_range":
        given = with_learned_variance(given)
    images = drawn_by_diffusers(given, tmp_path / "out", 40, monkeypatch)
    ours = sample(given.process(), given.network(), (1, 8, 8), SEEDS, steps=40, spacing="leading")
    assert_within_a_grey_level(ours, images)


def test_a_dynamic_threshold_is_that_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(trained("eps"), dynamic_threshold=0.9, spacing="trailing")
    images = drawn_by_diffusers(given, tmp_path / "out", 20, monkeypatch)
    process, network = given.process(), given.network()
    ours = sample(process, network, (1, 8, 8), SEEDS, steps=20, spacing="trailing", dynamic_threshold=0.9)
    assert_within_a_grey_level(ours, images)
    clipped = sample(process, network, (1, 8, 8), SEEDS, steps=20, spacing="trailing")
    assert (ours - clipped).abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_of_diffusers_draws_our_images(eta: float, tmp_path: Path) -> None:
    given = trained("eps")
    write_diffusers(given, tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    scheduler, draws = DDIMScheduler.from_config(pipeline.scheduler.config), keyed_noise()
    scheduler.set_timesteps(20)
    x = next(draws)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = pipeline.unet(x, t).sample
            x = scheduler.step(
                output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=next(draws)
            ).prev_sample
    ours = sample(
        given.process(), given.network(), (1, 8, 8), SEEDS, sampler="ddim", steps=20, eta=eta, spacing="leading"
    )
    assert_within_a_grey_level(ours, x)


def test_the_learned_variance_is_that_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(**(SMALL.to_dict() | {"learned_variance": True}))
    given = portable(config, variance="learned_range")
    write_diffusers(given, tmp_path / "out")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    process, unet = given.process(), given.network()
    x, eps = draw(4, 1, 8, 8), draw(4, 1, 8, 8).flip(0)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: eps)
    for t in (2, 500, 999):
        with torch.inference_mode():
            output = unet(x, torch.full((4,), t - 1))
        step = process.reverse(x, torch.full((4,), t), output, clip_x0=True)
        expected = scheduler.step(output, t - 1, x).prev_sample
        error = (step.mean + step.variance.sqrt() * eps - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()
