import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise, sample
from tests.ddpm_core.gaussian_oracle import GaussianOracle

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def network() -> UNet:
    model = UNet(UNetConfig(channels=(8, 16), groups=4, dropout=0.5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("settings", [{"sampler": "ancestral"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}])
def test_an_image_depends_on_its_own_seed_alone(network: UNet, settings: dict[str, object]) -> None:
    process = GaussianDiffusion(LINEAR)
    one = sample(process, network, SHAPE, [1, 2, 3, 2**63 + 5], steps=8, **settings)
    other = sample(process, network, SHAPE, [9, 2, 8, 7], steps=8, **settings)
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one, sample(process, network, SHAPE, [1, 2, 3, 2**63 + 5], steps=8, **settings))
    assert (one.shape, one.dtype) == ((4, 1, 8, 8), torch.float32)
    assert one.abs().max() <= 1


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_ddim_with_eta_1_is_ancestral_small(network: UNet, clip_x0: bool, steps: int | None, predict: str) -> None:
    process = GaussianDiffusion(NoiseSchedule.sigmoid(60), predict=predict)
    ancestral, ddim = (
        sample(process, network, SHAPE, [1, 2], steps=steps, spacing="trailing", clip_x0=clip_x0, **settings)
        for settings in ({"sampler": "ancestral"}, {"sampler": "ddim", "eta": 1.0})
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "variance", "predict"),
    [
        ({"sampler": "ancestral"}, "small", "eps"),
        ({"sampler": "ancestral"}, "large", "x0"),
        ({"sampler": "ddim"}, "small", "eps"),
        ({"sampler": "ddim", "steps": 200, "spacing": "linspace"}, "small", "v"),
        ({"sampler": "ddim", "eta": 1.0}, "small", "eps"),
    ],
)
def test_the_best_network_gives_back_mean_and_spread(settings: dict[str, object], variance: str, predict: str) -> None:
    process = GaussianDiffusion(LINEAR, predict=predict, variance=variance)
    oracle = GaussianOracle(process, mean=0.3, std=0.2)
    x = sample(process, oracle, SHAPE, range(150), clip_x0=False, **settings)
    assert x.mean().item() == pytest.approx(0.3, abs=4 * 0.2 / x.numel() ** 0.5 + 0.002)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)
    # Pixels stay independent.
    assert abs(torch.corrcoef(torch.stack((x[..., ::2].flatten(), x[..., 1::2].flatten())))[0, 1]) < 0.06


def test_steps_noise_is_keyed_by_seed_and_step() -> None:
    """Two ancestral steps by hand, noise taken from its documented place."""
    process = GaussianDiffusion(LINEAR, predict="x0")
    seen: list[Tensor] = []
    sample(
        process,
        lambda x, t: 0.5 * x,
        SHAPE,
        [7, 11],
        steps=4,
        spacing="trailing",
        callback=lambda i, t, x, x0: seen.append(x),
    )
    keys = [noise.key(7, "sample"), noise.key(11, "sample")]
    assert torch.equal(seen[0], noise.normal(keys, SHAPE, counter=0))
    respaced = process.respace(4, "trailing")
    for index in (0, 1, 2):
        t = torch.tensor([4 - index])
        mean, variance = respaced.posterior((0.5 * seen[index]).clamp(-1, 1), seen[index], t)
        expected = mean + variance.sqrt() * noise.normal(keys, SHAPE, counter=index + 1)
        torch.testing.assert_close(seen[index + 1], expected)


def test_callback_sees_the_trajectory(network: UNet) -> None:
    process = GaussianDiffusion(LINEAR)
    rows = []
    x = sample(
        process,
        network,
        SHAPE,
        [1, 2],
        sampler="ddim",
        steps=5,
        spacing="trailing",
        callback=lambda index, t, x_t, x0: rows.append((index, t, x_t, x0)),
    )
    assert [(index, t) for index, t, _, _ in rows] == [(0, 1000), (1, 800), (2, 600), (3, 400), (4, 200)]
    assert all(x_t.shape == x0.shape == x.shape and x0.abs().max() <= 1 for _, _, x_t, x0 in rows)
    torch.testing.assert_close(rows[-1][3], x)


def test_clipped_ddim_stays_consistent() -> None:
    """With x0 clipped, eps is what remains of x_t: a step keeps the noise rate of x_t's rest."""
    process = GaussianDiffusion(LINEAR)
    rows = []
    sample(
        process,
        lambda x, t: torch.zeros_like(x),  # predicts x0 = x_t / signal rate: far outside at first
        SHAPE,
        [1],
        sampler="ddim",
        steps=10,
        callback=lambda index, t, x_t, x0: rows.append((x_t, x0)),
    )
    schedule = process.schedule.respace(10)
    (x_t, x0), (x_next, _) = rows[0], rows[1]
    before, now = schedule.alpha_bar[8], schedule.alpha_bar[9]
    eps = (x_t - now.sqrt() * x0) / (1 - now).sqrt()
    assert eps.abs().max() > 0.5
    expected = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(x_next, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_networks_mode_is_put_back_and_results_are_plain_tensors(network: UNet) -> None:
    def draw() -> Tensor:
        return sample(GaussianDiffusion(LINEAR), network, SHAPE, [1], steps=2, spacing="trailing")

    network.train()
    x = draw()
    assert network.training
    assert network.down[0].blocks[0].dropout.training
    assert not x.is_inference()
    assert not x.requires_grad
    network.eval()
    assert torch.equal(draw(), x)  # no dropout either way
    assert not network.training


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_zero_terminal_schedules_sample(network: UNet, predict: str) -> None:
    process = GaussianDiffusion(LINEAR.rescale_zero_terminal(), predict=predict)
    for settings in ({"sampler": "ancestral"}, {"sampler": "ddim"}):
        assert sample(process, network, SHAPE, [1], steps=5, spacing="trailing", **settings).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "euler"}, "ancestral, ddim, not 'euler'"),
        ({"eta": 0.5}, "eta belongs to the ddim sampler"),
        ({"sampler": "ddim", "eta": 1.5}, r"0\.\.1, not 1.5"),
        ({"seeds": []}, "seeds is empty"),
        ({"steps": 1001}, r"1\.\.1000"),
        ({"steps": 0}, r"1\.\.1000"),
        ({"steps": 10, "spacing": "odd"}, "spacing"),
    ],
)
def test_bad_input(network: UNet, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample(GaussianDiffusion(LINEAR), network, SHAPE, **({"seeds": [1]} | settings))
