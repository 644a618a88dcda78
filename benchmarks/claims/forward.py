"""The closed form of the forward process, q(x_t | x_0), against iterating its steps on real images."""

import time
from typing import Any

import torch
from torch import Tensor

from ddpm_core import GaussianDiffusion, noise

VERSION = 2
"""Raised where the comparison changes."""
SHOWN = (1, 10, 100, 300, 1000)
"""Timesteps at which the two are compared."""
PIXELS = 250_000
"""About so many pixels go through the chain."""


def compare(process: GaussianDiffusion, images: Tensor, seed: int) -> dict[str, Any]:
    """Of images float32 [N, C, H, W], at each of `SHOWN`.

    exact_mean, exact_variance: largest relative deviation of the moments that `q_step` itself composes, in float64,
    from those of `q_sample`. signal, variance: relative deviation of what chains of drawn noise measure, from the
    closed form; signal_error, variance_error: the standard errors of these. cost: how many times longer it takes to
    get to x_T by steps than at once, the noise included.
    """
    chains = images.repeat(-(-PIXELS // images.numel()), 1, 1, 1)[: max(1, PIXELS // images[0].numel())]
    return {**_exact(process, images[:64].double()), **_drawn(process, chains, seed)}


def _exact(process: GaussianDiffusion, x0: Tensor) -> dict[str, list[float]]:
    """A step is affine in (x, eps): its moments follow from where it takes x alone and eps alone."""
    none, one = torch.zeros_like(x0), torch.ones_like(x0)
    mean, variance = x0, torch.zeros_like(x0)
    out: dict[str, list[float]] = {"exact_mean": [], "exact_variance": []}
    for step in range(1, process.timesteps + 1):
        t = torch.tensor([step])
        mean = process.q_step(mean, t, none)
        variance = process.q_step(variance.sqrt(), t, none).square() + process.q_step(none, t, one).square()
        if step in SHOWN:
            closed_mean = process.q_sample(x0, t, none)
            closed_variance = process.q_sample(none, t, one).square()
            out["exact_mean"].append(float((mean / closed_mean - 1).abs().max()))
            out["exact_variance"].append(float((variance / closed_variance - 1).abs().max()))
    return out


def _drawn(process: GaussianDiffusion, x0: Tensor, seed: int) -> dict[str, Any]:
    key = [noise.key(seed, "claims-forward")]
    names = ("signal", "signal_error", "variance", "variance_error")
    out: dict[str, Any] = {name: [] for name in names}
    signals, rates = process.schedule.signal_rate, process.schedule.noise_rate
    power = x0.double().square().sum().item()
    x, steps = x0, []
    for step in range(1, process.timesteps + 1):
        t = torch.tensor([step])
        start = time.perf_counter()
        x = process.q_step(x, t, noise.normal(key, x0.shape, counter=step)[0])
        steps.append(time.perf_counter() - start)
        if step in SHOWN:
            signal, rate = float(signals[step - 1]), float(rates[step - 1])
            slope = (x.double() * x0).sum().item() / power
            rest = (x.double() - signal * x0).square().mean().item()
            values = (slope / signal - 1, rate / signal / power**0.5, rest / rate**2 - 1, (2 / x0.numel()) ** 0.5)
            for name, value in zip(names, values, strict=True):
                out[name].append(value)
    jumps = []
    for again in range(51):
        start = time.perf_counter()
        process.q_sample(x0, torch.tensor([process.timesteps]), noise.normal(key, x0.shape, counter=again)[0])
        jumps.append(time.perf_counter() - start)
    # The fastest of each, for the machine may be shared.
    cost = process.timesteps * min(steps) / min(jumps)
    return {**out, "cost": cost, "pixels": x0.numel()}
