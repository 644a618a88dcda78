import pytest
import torch

from ddpm_core import Ema, ema_decay


def test_average_is_the_brute_force_sum() -> None:
    """The average is a weighted sum of all values seen, the weights products of decays: added up one by one."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 5, generator=generator) for _ in range(40)]
    ema = Ema([values[0][0], values[0][1]], half_life=700, ramp_up=0.1)
    for step, value in enumerate(values[1:], start=1):
        ema.update([value[0], value[1]], images_seen=64 * step, batch=64)
    decays = [0.5 ** (64 / min(700, 0.1 * 64 * step)) for step in range(1, 40)]
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for i, value in enumerate(values):
        weight = 1.0 if i == 0 else 1 - decays[i - 1]
        for decay in decays[i:]:
            weight *= decay
        expected += weight * value.double()
    torch.testing.assert_close(torch.stack(ema.tensors).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [10, 50, 250])
def test_half_life_is_in_images_whatever_the_batch(batch: int) -> None:
    ema = Ema([torch.zeros(1)], half_life=1000, ramp_up=None)
    for seen in range(batch, 1001, batch):
        ema.update([torch.ones(1)], seen, batch)
    assert ema.tensors[0].item() == pytest.approx(0.5, rel=1e-4)


def test_a_short_run_keeps_nothing_of_its_first_weights() -> None:
    ramped, plain = (Ema([torch.ones(1)], half_life=500_000, ramp_up=r) for r in (0.05, None))
    for step in range(1, 21):
        for ema in (ramped, plain):
            ema.update([torch.zeros(1)], 128 * step, 128)
    assert ramped.tensors[0].item() < 1e-12
    assert plain.tensors[0].item() > 0.99


def test_ramp_up_ends_where_the_half_life_is_reached() -> None:
    assert ema_decay(1000, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 50)
    assert ema_decay(2000, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 100)
    assert ema_decay(10**9, 10, half_life=100, ramp_up=0.05) == 0.5 ** (10 / 100)
    assert ema_decay(10, 10, half_life=0) == 0


def test_update_is_in_place_and_leaves_the_weights_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    ema = Ema([weight], half_life=100)
    place = ema.tensors[0].data_ptr()
    with torch.no_grad():
        weight.fill_(2)
    ema.update([weight], 10, 10)
    assert ema.tensors[0].data_ptr() == place
    assert not ema.tensors[0].requires_grad
    assert weight.tolist() == [2, 2, 2]
    assert ema.tensors[0].tolist() == pytest.approx([2, 2, 2], rel=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="half_life -1"):
        Ema([torch.ones(1)], half_life=-1)
    with pytest.raises(ValueError, match="float32"):
        Ema([torch.ones(1, dtype=torch.bfloat16)], half_life=1)
    with pytest.raises(ValueError, match="images_seen 5, batch 10"):
        ema_decay(5, 10, 100)
    with pytest.raises(ValueError, match="shorter"):
        Ema([torch.ones(1)], half_life=1).update([], 1, 1)
