import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core import UNet, UNetConfig, noise
from ddpm_core.unet_blocks import Attention, Downsample, NormAct, time_embedding

DIGITS = UNetConfig()
ATTENTION = UNetConfig(channels=(32, 64, 64), blocks=2, attention=(1,), mid_attention=True)
SMALL = UNetConfig(channels=(8, 16, 16), blocks=1, attention=(1,), mid_attention=True, groups=4, image_channels=3)
CLASSES = UNetConfig(**(SMALL.to_dict() | {"num_classes": 5}))


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
        (UNetConfig(**(DIGITS.to_dict() | {"num_classes": 10})), 634_273 + 11 * 128),
        (UNetConfig(**(DIGITS.to_dict() | {"learned_variance": True})), 634_273 + 32 * 9 + 1),
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


def test_mnist_sized_images_of_one_channel_need_no_padding() -> None:
    x = draw(2, 1, 28, 28)
    assert trained(ATTENTION)(x, torch.tensor([0, 999])).shape == x.shape


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 8, 6), (2, 1, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] with H and W divisible by 4"):
        UNet(SMALL)(draw(*shape), torch.tensor([0, 1]))


def test_other_numbers_of_timesteps_are_refused() -> None:
    model = UNet(DIGITS)
    for shape in ((3,), (2, 1), (0,)):
        with pytest.raises(ValueError, match=r"one timestep an image is needed, \[2\], not "):
            model(draw(2, 1, 8, 8), torch.zeros(shape, dtype=torch.int64))
    one, each = (model(draw(2, 1, 8, 8), torch.tensor(t)) for t in (7, [7, 7]))
    assert torch.equal(one, each)


def test_the_output_is_float32_under_autocast() -> None:
    """bfloat16 has 8 bits: what is read from the output would magnify that error."""
    model = trained(DIGITS)
    x, t = draw(2, 1, 8, 8), torch.tensor([1, 900])
    heard: list[torch.dtype] = []
    for conv in (model.conv_in, model.conv_out):
        conv.register_forward_hook(lambda module, args, output: heard.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x, t)
    assert heard == [torch.bfloat16, torch.float32]
    assert (output != output.bfloat16().float()).double().mean() > 0.9
    torch.testing.assert_close(output, model(x, t), rtol=0, atol=0.1)


def test_shapes_can_be_had_without_numbers() -> None:
    output = UNet(DIGITS).to("meta")(draw(2, 1, 8, 8).to("meta"), torch.tensor([1, 900], device="meta"))
    assert output.shape == (2, 1, 8, 8)


def test_a_network_of_half_precision_answers_in_it() -> None:
    output = trained(DIGITS).bfloat16()(draw(2, 1, 8, 8).bfloat16(), torch.tensor([1, 900]))
    assert output.dtype == torch.bfloat16


def test_at_first_the_network_answers_zero_and_blocks_pass_their_input_on() -> None:
    model = UNet(ATTENTION)
    assert (model(draw(2, 1, 8, 8), torch.tensor([3, 5])) == 0).all()
    block, attention = next(model.middle.pairs())
    x = draw(2, 64, 4, 4)
    assert torch.equal(block(x, draw(2, 64)), x)
    assert torch.equal(attention(x), x)


def test_gradients_reach_every_parameter() -> None:
    model = trained(CLASSES)
    model(draw(6, 3, 8, 8), torch.tensor([0, 10, 500, 999, 3, 4]), torch.arange(6)).square().mean().backward()
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
    for other in (UNetConfig(**(SMALL.to_dict() | {"blocks": 2})), CLASSES):
        assert torch.equal(UNet(other, seed=3).state_dict()["time_linear2.weight"], one["time_linear2.weight"])
    tables = [UNet(CLASSES, seed=seed).get_parameter("class_embedding.weight") for seed in (3, 3, 4)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


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


@pytest.mark.parametrize("sine_first", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_time_embedding(sine_first: bool, shift: int) -> None:
    got = time_embedding(torch.tensor([0, 17, 999]), 8, sine_first, shift)
    for row, t in zip(got.tolist(), (0, 17, 999), strict=True):
        angles = [t / 10000 ** (i / (4 - shift)) for i in range(4)]
        cosines, sines = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
        assert row == pytest.approx(sines + cosines if sine_first else cosines + sines, abs=2e-4)  # float32 angles


def test_the_time_conventions_reach_the_network() -> None:
    x, timestep = draw(1, 3, 8, 8), torch.tensor([700])
    y = trained(SMALL)(x, timestep)
    for field in ({"time_sine_first": True}, {"time_frequency_shift": 1}):
        other = UNet(UNetConfig(**(SMALL.to_dict() | field))).eval()
        other.load_state_dict(trained(SMALL).state_dict())
        assert (other(x, timestep) - y).abs().max() > 1e-4, field


def test_asymmetric_downsampling_pads_right_and_bottom() -> None:
    layer = Downsample(3, asymmetric=True)
    x = draw(2, 3, 6, 8)
    expected = F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)[:, :, 1::2, 1::2]
    torch.testing.assert_close(layer(x), expected)
    config = UNetConfig(**(SMALL.to_dict() | {"asymmetric_downsample": True}))
    assert trained(config)(draw(1, 3, 28, 28), torch.tensor([5])).shape == (1, 3, 28, 28)


def test_norm_eps_is_that_of_every_normalisation() -> None:
    model = UNet(UNetConfig(**(SMALL.to_dict() | {"norm_eps": 1e-6})))
    assert {m.eps for m in model.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_a_class_changes_its_own_image_alone() -> None:
    model = trained(CLASSES)
    assert model.class_embedding.weight.shape == (6, 32)  # five and the null class
    x, timestep = draw(3, 3, 8, 8), torch.tensor([1, 2, 3])
    y = model(x, timestep, torch.tensor([0, 5, 2]))
    z = model(x, timestep, torch.tensor([1, 5, 2]))
    assert torch.equal(y[1:], z[1:])
    assert (y[0] - z[0]).abs().max() > 1e-4


def test_the_class_is_added_to_the_embedding_of_the_time() -> None:
    model = trained(CLASSES)
    plain = UNet(SMALL).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "class_embedding.weight"})
    with torch.no_grad():
        plain.time_linear2.bias += model.class_embedding.weight[3]
    x, timestep = draw(2, 3, 8, 8), torch.tensor([1, 900])
    torch.testing.assert_close(model(x, timestep, torch.tensor([3, 3])), plain(x, timestep))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, r"labels must be int64 \[2\], not none"),
        (torch.tensor([0, 6]), r"0\.\.5, where 5 stands for no class, not in 0\.\.6"),
        (torch.tensor([-1, 0]), r"not in -1\.\.0"),
        (torch.tensor([1]), r"not torch\.int64 \[1\]"),
        (torch.tensor([0.0, 1.0]), r"not torch\.float32"),
    ],
)
def test_labels_that_are_none_of_the_classes_are_refused(labels: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNet(CLASSES)(draw(2, 3, 8, 8), torch.tensor([0, 1]), labels)


def test_without_a_null_class_its_label_is_refused() -> None:
    model = UNet(UNetConfig(**(CLASSES.to_dict() | {"null_class": False})))
    assert model.class_embedding.weight.shape == (5, 32)
    with pytest.raises(ValueError, match=r"0\.\.4, not in 5\.\.5"):
        model(draw(1, 3, 8, 8), torch.tensor([0]), torch.tensor([5]))


def test_labels_are_refused_by_a_network_without_classes() -> None:
    with pytest.raises(ValueError, match="has no classes"):
        UNet(SMALL)(draw(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))


def test_a_learned_variance_doubles_the_output_channels() -> None:
    model = trained(UNetConfig(**(SMALL.to_dict() | {"learned_variance": True})))
    assert model(draw(2, 3, 8, 8), torch.tensor([0, 1])).shape == (2, 6, 8, 8)


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
    layer = Attention(16, heads, groups=4, norm_eps=1e-5)
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
    config = UNetConfig(**(ATTENTION.to_dict() | {"head_channels": 16, "num_classes": 10, "norm_eps": 1e-6}))
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
        ({"num_classes": 0}, "num_classes must be 1 or more"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"time_frequency_shift": 16}, "below half"),
        ({"time_frequency_shift": -1}, "0 or more"),
        ({"chanels": (32,)}, "unknown U-Net fields"),
    ],
)
def test_bad_configs(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNetConfig.from_dict(values)
