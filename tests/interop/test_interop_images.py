"""diffusers' own pipelines draw our images, from what we write and from what they wrote."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from sklearn.datasets import load_digits
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise, sample
from pipelines.drawing import Settings, draw
from pipelines.foreign import of_diffusers
from pipelines.interop import Portable, write_diffusers
from tests.interop import interop_helpers
from tests.interop.interop_helpers import SMALL, portable

pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar is")  # leading spacing, as in diffusers, starts below T


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
    choice = 0.3 * interop_helpers.draw(1, 16, 3, 3)
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
    x, eps = interop_helpers.draw(4, 1, 8, 8), interop_helpers.draw(4, 1, 8, 8).flip(0)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: eps)
    for t in (2, 500, 999):
        with torch.inference_mode():
            output = unet(x, torch.full((4,), t - 1))
        step = process.reverse(x, torch.full((4,), t), output, clip_x0=True)
        expected = scheduler.step(output, t - 1, x).prev_sample
        error = (step.mean + step.variance.sqrt() * eps - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_a_folder_of_ddim_draws_as_its_own_pipeline_does(
    predict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By DDIM with eta 0, in as many steps. Where x0 is clipped, eps follows it here: its option, our rule."""
    write_diffusers(trained(predict), tmp_path / "ancestral")
    given = DDPMPipeline.from_pretrained(tmp_path / "ancestral")
    DDIMPipeline(given.unet, given.scheduler).save_pretrained(tmp_path / "ddim")

    pipeline = DDIMPipeline.from_pretrained(tmp_path / "ddim")
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: next(keyed_noise()))
    images = 2 * pipeline(batch_size=len(SEEDS), use_clipped_model_output=True, output_type="pt").images - 1

    model = of_diffusers(str(tmp_path / "ddim"))
    assert (model.spec.sample.sampler, model.spec.sample.eta, model.spec.sample.steps) == ("ddim", 0, 50)
    ours = draw(*model.build(), 8, Settings.of(model.spec.sample), range(len(SEEDS)), seeds=SEEDS)
    assert_within_a_grey_level(ours, images)
    apart = of_diffusers(str(tmp_path / "ancestral")).spec.sample
    assert (apart.sampler, apart.steps) == ("ancestral", 1000)


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_diffusers_draws_our_images_down_a_schedule_that_leaves_no_signal(
    predict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule.linear().rescale_zero_terminal()
    given = replace(trained(predict), schedule=schedule, spacing="trailing")
    images = drawn_by_diffusers(given, tmp_path / "out", 20, monkeypatch)
    ours = sample(given.process(), given.network(), (1, 8, 8), SEEDS, steps=20)
    assert_within_a_grey_level(ours, images)
