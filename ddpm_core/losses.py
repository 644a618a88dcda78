"""Losses as functions: weightings of the squared error, the bound's own losses, and its exact terms.

Every loss takes (process, model, x0, t, eps) and gives float32 [N]; the weighted squared error, L_simple, is the
process's own method `loss`.

Images, timesteps and noise that do not fit are ValueErrors, as in `GaussianDiffusion`.

Ho et al. 2020 (DDPM), equation 5: L = L_T + sum over t = 2..T of L_{t-1} + L_0, where L_T is the distance of
q(x_T) from the prior, L_{t-1} the divergence of the reverse step from the posterior, and L_0 the decoder's
negative log-likelihood of 8-bit pixels.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_core.checks import checked_timesteps

if TYPE_CHECKING:
    from ddpm_core.diffusion import GaussianDiffusion, Network, Reverse

# Weights [N] of the training loss at timesteps t [N].
Weighting = Callable[["GaussianDiffusion", Tensor], Tensor]

LEVELS = 256  # 8-bit pixels: x0 lies on the grid -1, -1 + 2/255, ..., 1


def uniform(process: "GaussianDiffusion", t: Tensor) -> Tensor:
    """Weight 1 at every timestep: L_simple (DDPM, eq. 14) where the network predicts eps."""
    return torch.ones(t.shape, dtype=torch.float32, device=t.device)


def squared_error(
    process: "GaussianDiffusion", prediction: Tensor, x0: Tensor, t: Tensor, eps: Tensor, weighting: Weighting
) -> Tensor:
    """Weighted squared error of what the network predicts, the mean over C, H, W: float32 [N]."""
    error = prediction.float() - process.target(x0, t, eps).float()
    return error.square().flatten(1).mean(1) * weighting(process, t).to(error)


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR_t, gamma) on the squared error of x0 (Hang et al. 2023, "Efficient diffusion training via
    min-SNR weighting strategy", section 3.4), whatever is predicted: min(SNR, gamma) / SNR on that of eps,
    min(SNR, gamma) / (SNR + 1) on that of v. At T of a schedule with zero terminal signal it is 0: what happens there
    is not trained. ValueError unless 0 < gamma < infinity.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0, and finite, not {gamma}")

    def weights(process: "GaussianDiffusion", t: Tensor) -> Tensor:
        return _snr(process, t).clamp(max=gamma) / _output_error(process, t)

    return weights


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """Weight 1 / (k + SNR_t)^gamma on the squared error of eps (Choi et al. 2022, "Perception prioritized training
    of diffusion models", eq. 8), whatever is predicted. At T of a schedule with zero terminal signal no error of eps is
    an error of x0, and the weight is 0: what happens there is not trained. ValueError unless gamma >= 0 and k > 0, both
    finite.
    """
    if not (0 <= gamma < math.inf and 0 < k < math.inf):
        raise ValueError(f"finite gamma >= 0 and k > 0 are needed, not gamma {gamma}, k {k}")

    def weights(process: "GaussianDiffusion", t: Tensor) -> Tensor:
        snr = _snr(process, t)
        return snr / (k + snr) ** gamma / _output_error(process, t)

    return weights


def _snr(process: "GaussianDiffusion", t: Tensor) -> Tensor:
    t = checked_timesteps(t, process.timesteps)
    return process.schedule.log_snr.to(t.device)[t - 1].exp()


def _output_error(process: "GaussianDiffusion", t: Tensor) -> Tensor:
    """Squared error of the network's output where that of the x0 behind it is 1, float64 [N], at the same x_t."""
    snr = _snr(process, t)
    if process.predict == "eps":
        return snr
    if process.predict == "x0":
        return torch.ones_like(snr)
    if process.predict == "v":
        return 1 + snr
    return process.at("mean_x0", t, snr).square()


def mean_matching(process: "GaussianDiffusion", model: "Network", x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The original objective, L_{t-1} (DDPM, eq. 8): |mu_tilde - mu_theta|^2 / (2 sigma_t^2) for t >= 2, and the
    decoder's L_0 (eq. 13) at t = 1, nats per dimension, float32 [N].

    The constant of eq. 8, which does not train, is left out: it is 0 for the small variance. Whatever the network
    predicts, its mean is matched. ValueError for a learned variance, which is no constant: use `vlb`.
    """
    if process.variance == "learned_range":
        raise ValueError("mean matching takes a fixed variance, small or large: train a learned one by hybrid or vlb")
    x_t = process.q_sample(x0, t, eps)
    reverse = process.reverse(x_t, t, process.call(model, x_t, t), clip_x0=False)
    target, _ = process.posterior(x0, x_t, t)
    loss = (target - reverse.mean).square() / (2 * reverse.variance)
    return _with_decoder(loss, x0, t, reverse).flatten(1).mean(1).float()


def vlb(process: "GaussianDiffusion", model: "Network", x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The bound's own term at t, bits per dimension, float32 [N]: T times its mean over t is DDPM's L but for L_T,
    which no network changes.

    `ddpm_core.timesteps` draws t so that it varies less than with t drawn evenly.
    """
    x_t = process.q_sample(x0, t, eps)
    return vlb_term(process, x0, x_t, t, process.call(model, x_t, t), clip_x0=False).float()


def hybrid(
    process: "GaussianDiffusion",
    model: "Network",
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    weighting: Weighting = uniform,
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_simple + vlb_weight L_vlb, the mean held fixed in the second, so that it trains the variance alone: float32
    [N] (Nichol and Dhariwal 2021, "Improved DDPM", eq. 16; L_vlb is T times the term at t, in bits per dimension).

    ValueError for a fixed variance, of which the second part would train nothing.
    """
    if process.variance != "learned_range":
        raise ValueError(f"the hybrid loss trains a learned variance, not a fixed one ({process.variance})")
    x_t = process.q_sample(x0, t, eps)
    output = process.call(model, x_t, t)
    prediction, choice = process.halves(x_t, output)
    if choice is None:
        raise ValueError("a learned variance is in the second half of the output's channels, which is missing")
    simple = squared_error(process, prediction, x0, t, eps, weighting)
    bound = vlb_term(process, x0, x_t, t, torch.cat((prediction.detach(), choice), dim=1), clip_x0=False)
    return simple + vlb_weight * process.timesteps * bound.float()


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats. All variances above 0."""
    return 0.5 * ((other_variance / variance).log() + (variance + (mean - other_mean).square()) / other_variance - 1)


def decoder_nll(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log of the probability that N(mean, variance) gives to the 8-bit pixel x0, elementwise, in nats.

    DDPM, eq. 13: the mass within half a level (1/255) of x0, the outermost pixels taking the tails. No floor is
    put under the probability. Computed from log-CDFs, so that it is right far out in the tails: use float64.
    """
    sigma = variance.sqrt()
    level = ((x0 + 1) * ((LEVELS - 1) / 2)).round()
    low = torch.where(level <= 0, -math.inf, (x0 - 1 / (LEVELS - 1) - mean) / sigma)
    high = torch.where(level >= LEVELS - 1, math.inf, (x0 + 1 / (LEVELS - 1) - mean) / sigma)
    # By symmetry, take the side on which the CDF is small and keeps its digits.
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-(torch.special.log_ndtr(low) - log_high).exp()))


def vlb_term(process: "GaussianDiffusion", x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, clip_x0: bool) -> Tensor:
    """The bound's term at t, float64 [N] in bits per dimension: L_{t-1} for t >= 2, the decoder's L_0 for t = 1.

    `output` is the network's at x_t. With `clip_x0` the bound is that of the model which clips its predicted x0,
    as sampling does.
    """
    return reverse_term(process, x0, x_t, t, process.reverse(x_t.double(), t, output, clip_x0))


def reverse_term(process: "GaussianDiffusion", x0: Tensor, x_t: Tensor, t: Tensor, model: "Reverse") -> Tensor:
    """`vlb_term` of a reverse step that is known already, in float64."""
    x0, x_t = x0.double(), x_t.double()
    mean, variance = process.posterior(x0, x_t, t)
    # The posterior's variance is 0 at t = 1; the value put in is not used.
    kl = gaussian_kl(mean, torch.where(_first(t, x0), 1.0, variance), model.mean, model.variance)
    return _with_decoder(kl, x0, t, model).flatten(1).mean(1) / math.log(2)


def _with_decoder(nats: Tensor, x0: Tensor, t: Tensor, model: "Reverse") -> Tensor:
    """The terms [N, C, H, W], with the decoder's where t is 1."""
    first = (t.reshape(-1).expand(len(x0)) == 1).to(x0.device)
    if not first.any():
        return nats
    # Of these images alone: elsewhere it means nothing, and could be infinite.
    decoder = decoder_nll(x0[first].double(), model.mean[first].double(), model.variance[first].double())
    return nats.index_put((first,), decoder.to(nats.dtype))


def _first(t: Tensor, x0: Tensor) -> Tensor:
    """Where t is 1, shaped to select among [N, C, H, W]."""
    return (t == 1).view(-1, *[1] * (x0.ndim - 1)).to(x0.device)


def prior_term(process: "GaussianDiffusion", x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), float64 [N] in bits per dimension. It does not depend on the network."""
    x0 = x0.double()
    alpha_bar = process.schedule.alpha_bar[-1].to(x0.device)
    mean, variance = alpha_bar.sqrt() * x0, (1 - alpha_bar).expand_as(x0)
    kl = gaussian_kl(mean, variance, torch.zeros_like(mean), torch.ones_like(mean))
    return kl.flatten(1).mean(1) / math.log(2)
