"""Labels and classifier-free guidance: as functions of a network, and through the samplers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, NoiseSchedule, UNet, UNetConfig, noise, sample
from ddpm_core.guidance import Conditioned, dropped

CLASSES, NULL = 3, 3
SHAPE = (1, 8, 8)
COSINE = NoiseSchedule.cosine(100)


def network(**fields: Any) -> UNet:
    """A class-conditional network whose classes differ."""
    settings = {"channels": (8, 16), "groups": 4, "num_classes": CLASSES} | fields
    model = UNet(UNetConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> UNet:
    return network()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3, 50, 98, 0]), torch.tensor([0, 1, 2, 1])


def passes(model: UNet) -> list[int]:
    """The sizes of the batches that the model is given from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@torch.inference_mode()
def test_guidance_goes_from_the_unconditional_through_the_conditional(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    model = network()
    with_class, without = model(x, t, labels), model(x, t, torch.full_like(labels, NULL))
    assert (with_class - without).abs().max() > 0.1
    sizes = passes(model)
    assert torch.equal(Conditioned(model, labels)(x, t), with_class)
    assert sizes == [4]  # one pass
    assert torch.equal(Conditioned(model, labels, 0.0)(x, t), without)
    assert sizes == [4, 4]
    for w in (0.5, 2.0, 7.5):
        sizes.clear()
        # Ho and Salimans 2022, eq. 6: (1 + w') eps(z, c) - w' eps(z), w' = w - 1.
        expected = w * with_class - (w - 1) * without
        torch.testing.assert_close(Conditioned(model, labels, w)(x, t), expected, rtol=1e-4, atol=1e-5)
        assert sizes == [8]  # a pass of twice the batch


@torch.inference_mode()
@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_one_timestep_serves_all_images(model: UNet, inputs: tuple[Tensor, Tensor, Tensor], w: float) -> None:
    x, _, labels = inputs
    conditioned = Conditioned(model, labels, w)
    expected = conditioned(x, torch.full((len(x),), 5))
    for shape in ((), (1,)):
        assert torch.equal(conditioned(x, torch.full(shape, 5)), expected)


def test_labels_go_where_the_network_goes_and_are_no_weights() -> None:
    model = network()
    conditioned = Conditioned(model, torch.tensor([0, 1]), 2.0)
    assert set(conditioned.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    conditioned.to("meta")
    assert {tensor.device.type for tensor in (*conditioned.buffers(), *model.parameters())} == {"meta"}


@torch.inference_mode()
def test_guidance_with_the_null_class_steers_nowhere(model: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    null = torch.full_like(labels, NULL)
    torch.testing.assert_close(Conditioned(model, null, 4.0)(x, t), model(x, t, null))


@pytest.mark.parametrize("predict", ["x0", "v", "mean"])
@torch.inference_mode()
def test_guiding_another_prediction_is_guiding_eps(
    model: UNet, inputs: tuple[Tensor, Tensor, Tensor], predict: str
) -> None:
    """All are linear in one another at a given x_t, so that the paper's eps may be guided through any of them."""
    x, timestep, labels = inputs
    process = GaussianDiffusion(COSINE, predict)
    t = timestep + 1
    with_class, without = (model(x, timestep, c).double() for c in (labels, torch.full_like(labels, NULL)))
    eps = [process.predict_eps(x.double(), t, output) for output in (with_class, without)]
    expected = eps[1] + 3 * (eps[0] - eps[1])
    got = process.predict_eps(x.double(), t, Conditioned(model, labels, 3.0)(x, timestep).double())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_a_learned_variance_stays_the_conditional_one(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    model = network(learned_variance=True)
    with_class, without = model(x, t, labels), model(x, t, torch.full_like(labels, NULL))
    got = Conditioned(model, labels, 2.0, channels=1)(x, t)
    torch.testing.assert_close(got[:, :1], 2 * with_class[:, :1] - without[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, 1:], with_class[:, 1:])
    assert torch.equal(Conditioned(model, labels, 0.0, channels=1)(x, t), without)  # but of no class, no class's
    everything = Conditioned(model, labels, 2.0)(x, t)
    torch.testing.assert_close(everything, 2 * with_class - without, rtol=1e-4, atol=1e-5)


def test_networks_that_cannot_be_guided() -> None:
    labels = torch.tensor([0])
    plain = UNet(UNetConfig(channels=(8,), groups=4))
    with pytest.raises(ValueError, match="the network has no classes"):
        Conditioned(plain, labels)
    with pytest.raises(ValueError, match="null class"):
        Conditioned(network(null_class=False), labels, 2.0)
    Conditioned(network(null_class=False), labels, 1.0)
    for w in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="0 or more, and finite, not"):
            Conditioned(network(), labels, w)


def test_dropped_labels() -> None:
    labels = torch.arange(6) % CLASSES
    uniforms = torch.tensor([0.0, 0.0999, 0.1, 0.5, 0.05, 0.999], dtype=torch.float64)
    assert dropped(labels, uniforms, 0.1, NULL).tolist() == [NULL, NULL, 2, 0, NULL, 2]
    assert dropped(labels, uniforms, 0.0, NULL).tolist() == labels.tolist()
    assert dropped(labels, uniforms, 1.0, NULL).tolist() == [NULL] * 6
    assert dropped(labels, uniforms, 0.1, NULL).dtype == torch.int64
    many = torch.zeros(100_000, dtype=torch.int64)
    share = (dropped(many, noise.uniform([5], 100_000)[0], 0.2, NULL) == NULL).double().mean().item()
    assert share == pytest.approx(0.2, abs=5 * (0.16 / 100_000) ** 0.5)
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"in 0\.\.1, not"):
            dropped(labels, uniforms, bad, NULL)


# Through the samplers.


def drawn(model: UNet, labels: Sequence[int] | None, seeds: Sequence[int] = (1, 2, 3), **settings: Any) -> Tensor:
    process = GaussianDiffusion(COSINE, "v", settings.pop("variance", "small"))
    return sample(process, model, SHAPE, seeds, steps=6, labels=labels, **settings)


SAMPLERS = ["ancestral", "ddim", "dpmpp_2m"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_1_samples_the_conditional_model_and_0_the_unconditional_one(model: UNet, sampler: str) -> None:
    process = GaussianDiffusion(COSINE, "v")

    def by_hand(labels: list[int]) -> Tensor:
        given = torch.tensor(labels)
        return sample(process, lambda x, t: model(x, t, given), SHAPE, [1, 2, 3], sampler, steps=6)

    conditional = drawn(model, [0, 1, 2], sampler=sampler)
    assert torch.equal(conditional, by_hand([0, 1, 2]))
    assert torch.equal(drawn(model, [0, 1, 2], sampler=sampler, guidance=1.0), conditional)
    unconditional = drawn(model, [0, 1, 2], sampler=sampler, guidance=0.0)
    torch.testing.assert_close(unconditional, by_hand([NULL] * 3), rtol=1e-4, atol=1e-4)
    assert (conditional - unconditional).abs().max() > 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_own_seed_and_label_alone(model: UNet, sampler: str, guidance: float) -> None:
    one = drawn(model, [0, 1, 2], (1, 2, 3), sampler=sampler, guidance=guidance)
    other = drawn(model, [2, 1, 0], (7, 2, 3), sampler=sampler, guidance=guidance)
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[2], other[2])  # the same seed, another class
    moved = drawn(model, [1, 0, 2], (2, 1, 3), sampler=sampler, guidance=guidance)
    torch.testing.assert_close(moved, one[[1, 0, 2]], rtol=1e-5, atol=1e-5)


def test_guidance_of_a_learned_variance_through_the_sampler() -> None:
    """The mean is guided, the spread is the class's: one step by hand, against the first step of the sampler."""
    model = network(learned_variance=True)
    process = GaussianDiffusion(COSINE, "v", "learned_range").respace(6)
    seen: list[Tensor] = []
    drawn(
        model,
        [0, 2],
        (1, 2),
        variance="learned_range",
        guidance=2.5,
        callback=lambda index, t, x_t, x0: seen.append(x_t),
    )
    labels, t = torch.tensor([0, 2]), torch.tensor([6, 6])
    with torch.inference_mode():
        with_class, without = (
            process.call(lambda x, timestep, c=c: model(x, timestep, c), seen[0], t)
            for c in (labels, torch.full_like(labels, NULL))
        )
    guided = without[:, :1] + 2.5 * (with_class[:, :1] - without[:, :1])
    x0 = process.predict_x0(seen[0], t, guided).clamp(-1, 1)
    mean, _ = process.posterior(x0, seen[0], t)
    variance = process.predict_variance(seen[0], t, with_class)
    draw = noise.normal([noise.key(seed, "sample") for seed in (1, 2)], SHAPE, counter=1)
    torch.testing.assert_close(seen[1], mean + variance.sqrt() * draw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": None, "guidance": 2.0}, "give labels"),
        ({"labels": None}, "this network has classes"),
        ({"labels": [0, 1]}, "2 for 3 images"),
        ({"labels": [0, 1, 4]}, r"0\.\.3.*not in 0\.\.4"),
        ({"labels": [0, 1, -1]}, r"0\.\.3"),
        ({"labels": [0, 1, 2], "guidance": -1.0}, "0 or more, and finite, not -1.0"),
    ],
)
def test_labels_that_do_not_fit(model: UNet, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        drawn(model, **settings)


def test_labels_are_for_networks_with_classes() -> None:
    process = GaussianDiffusion(COSINE, "v")
    with pytest.raises(ValueError, match="UNet with classes"):
        sample(process, lambda x, t: x, SHAPE, [1], labels=[0])
    with pytest.raises(ValueError, match="no classes"):
        sample(process, UNet(UNetConfig(channels=(8,), groups=4)), SHAPE, [1], labels=[0])
    with pytest.raises(ValueError, match="null class"):
        sample(process, network(null_class=False), SHAPE, [1], labels=[0], guidance=2.0)
