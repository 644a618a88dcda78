import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core import UNet, UNetConfig, noise
from ddpm_core.unet import Attention, NormAct, time_embedding

DIGITS = UNetConfig()
ATTENTION = UNetConfig(channels=(32, 64, 64), blocks=2, attention=(1,), mid_attention=True)
SMALL = UNetConfig(channels=(8, 16, 16), blocks=1, attention=(1,), mid_attention=True, groups=4, image_channels=3)


def trained(config: UNetConfig) -> UNet:
    """A network whose zero-initialised ends have moved."""
    model = UNet(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DIGITS, 634_273),
        (ATTENTION, 1_623_169),
        # Heads divide the same weights.
        (UNetConfig(**(ATTENTION.to_dict() | {"head_channels": 8})), 1_623_169),
    ],
)
def test_parameter_count_is_that_of_the_reference_architecture(config: UNetConfig, count: int) -> None:
    """634,273 and 1,623,169 are diffusers' UNet2DModel of the same settings."""
    assert sum(parameter.numel() for parameter in UNet(config).parameters()) == count


@pytest.mark.parametrize(
    ("head_channels", "pixels", "power"),
    [
        (None, [[0.2880341406, 0.0323893710, 0.5765281363], [0.0390285722, 0.2960703419, 0.2295389678]], 0.1366149360),
        (4, [[0.3032313794, 0.0574125195, 0.6137321984], [-0.0071680191, 0.1915511764, 0.1414187860]], 0.1272898194),
    ],
)
def test_outputs_are_those_of_the_reference_architecture(
    head_channels: int | None, pixels: list[list[float]], power: float
) -> None:
    """Outputs of diffusers' UNet2DModel 0.42.1 in float64, with these weights loaded under its names."""
    model = UNet(UNetConfig(**(SMALL.to_dict() | {"head_channels": head_channels}))).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * noise.normal([noise.key(0, f"golden/{name}")], parameter.shape)[0])
    y = model(noise.normal([1, 2], (3, 8, 8)).double(), torch.tensor([3, 700]))
    torch.testing.assert_close(y[:, :, 2, 5], torch.tensor(pixels).double(), rtol=0, atol=1e-6)
    assert y.square().mean().item() == pytest.approx(power, rel=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (12, 20), (4, 4)])
def test_any_size_that_the_levels_divide(size: tuple[int, int]) -> None:
    x = draw(2, 3, *size)
    y = trained(SMALL)(x, torch.tensor([0, 999]))
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 8, 6), (2, 1, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] with H and W divisible by 4"):
        UNet(SMALL)(draw(*shape), torch.tensor([0, 1]))


def test_at_first_the_network_answers_zero_and_blocks_pass_their_input_on() -> None:
    model = UNet(ATTENTION)
    assert (model(draw(2, 1, 8, 8), torch.tensor([3, 5])) == 0).all()
    block, attention = next(model.middle.pairs())
    x = draw(2, 64, 4, 4)
    assert torch.equal(block(x, draw(2, 64)), x)
    assert torch.equal(attention(x), x)


def test_gradients_reach_every_parameter() -> None:
    model = trained(SMALL)
    model(draw(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # softmax is blind to a shift that all keys share
            assert parameter.grad.abs().max() > 1e-9, name


def test_gradients_are_those_of_finite_differences() -> None:
    model = trained(SMALL).double()
    x, timestep = draw(2, 3, 4, 4).double(), torch.tensor([2, 700])
    loss = model(x, timestep).square().sum()
    loss.backward()
    for name in ("time_linear1.weight", "down.0.resample.conv.weight", "middle.attentions.0.query.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
            up = model(x, timestep).square().sum()
            parameter.sub_(2e-6 * direction)
            down = model(x, timestep).square().sum()
            parameter.add_(1e-6 * direction)
        expected = (parameter.grad * direction).sum().item()
        assert ((up - down) / 2e-6).item() == pytest.approx(expected, rel=1e-4), name


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    one = UNet(SMALL, seed=3).state_dict()
    torch.manual_seed(1)
    model = UNet(SMALL, seed=4)
    other = model.state_dict()
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    model.init_weights(3)
    assert all(torch.equal(value, one[name]) for name, value in model.state_dict().items())
    # Keyed by name: the same layer of another network starts the same.
    deeper = UNet(UNetConfig(**(SMALL.to_dict() | {"blocks": 2})), seed=3).state_dict()
    assert torch.equal(deeper["time_linear2.weight"], one["time_linear2.weight"])


def test_first_weights_are_glorot_uniform() -> None:
    weight = UNet(DIGITS).get_parameter("down.1.blocks.0.conv1.weight")  # 32 -> 64, 3x3
    bound = math.sqrt(6 / ((32 + 64) * 9))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(weight.mean().item()) < 4 * bound / math.sqrt(3 * weight.numel())
    first, second = (UNet(ATTENTION).get_parameter(f"down.1.attentions.0.{name}.weight") for name in ("query", "value"))
    assert not torch.equal(first, second)


def test_images_do_not_see_each_other_but_see_their_time() -> None:
    model = trained(SMALL)
    x = draw(3, 3, 8, 8)
    y = model(x, torch.tensor([1, 2, 3]))
    z = model(torch.cat((x[:1], 2 * x[1:])), torch.tensor([1, 7, 9]))
    assert torch.equal(y[0], z[0])
    assert (model(x, torch.tensor([1, 2, 4]))[2] - y[2]).abs().max() > 1e-4
    torch.testing.assert_close(model(x, torch.tensor(2)), model(x, torch.tensor([2, 2, 2])))


def test_time_shifts_follow_the_blocks() -> None:
    model = UNet(ATTENTION)
    widths = [shift.shape for shift in model.time_shifts(torch.tensor([0, 1]))]
    assert widths == [(2, c) for c in (32, 32, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 32, 32, 32)]


def test_time_embedding() -> None:
    got = time_embedding(torch.tensor([0, 17, 999]), 8)
    for row, t in zip(got.tolist(), (0, 17, 999), strict=True):
        angles = [t / 10000 ** (i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles up to 1000


def test_norm_act_normalises_the_shifted_groups() -> None:
    layer = NormAct(2, 6, eps=1e-5)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, shift = 3 + draw(2, 6, 4, 5), draw(2, 6)
    groups = (x + shift.view(2, 6, 1, 1)).view(2, 2, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
    y = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x)
    y = y * layer.weight.view(6, 1, 1) + layer.bias.view(6, 1, 1)
    torch.testing.assert_close(layer(x, shift), y * y.sigmoid())
    torch.testing.assert_close(layer(x), layer(x, torch.zeros(2, 6)))


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_softmax_of_scaled_products(heads: int) -> None:
    layer = Attention(16, heads, groups=4)
    x = draw(2, 16, 3, 5)
    tokens = F.group_norm(x, 4, eps=1e-5).permute(0, 2, 3, 1).reshape(2, 15, 16)
    columns = []
    for h in range(heads):
        part = slice(h * 16 // heads, (h + 1) * 16 // heads)
        q, k, v = (projection(tokens)[..., part] for projection in (layer.query, layer.key, layer.value))
        columns.append((q @ k.mT / math.sqrt(16 / heads)).softmax(-1) @ v)
    y = x + layer.out(torch.cat(columns, -1)).mT.view_as(x)
    torch.testing.assert_close(layer(x), y)


def test_dropout_follows_torchs_generator() -> None:
    model = trained(UNetConfig(**(SMALL.to_dict() | {"dropout": 0.5}))).train()
    x, timestep = draw(2, 3, 8, 8), torch.tensor([1, 2])
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(x, timestep))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_config_survives_json() -> None:
    config = UNetConfig(**(ATTENTION.to_dict() | {"head_channels": 16}))
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"channels": (30,)}, "must divide every entry"),
        ({"channels": ()}, "must not be empty"),
        ({"channels": (7,), "groups": 7}, "even"),
        ({"attention": (2,)}, r"0\.\.1"),
        ({"attention": (-1,)}, r"0\.\.1"),
        ({"dropout": 1.0}, "dropout"),
        ({"blocks": 0}, "1 or more"),
        ({"image_channels": 0}, "1 or more"),
        ({"mid_attention": True, "head_channels": 24}, r"head_channels \(24\)"),
        ({"chanels": (32,)}, "unknown U-Net fields"),
    ],
)
def test_bad_configs(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNetConfig.from_dict(values)
