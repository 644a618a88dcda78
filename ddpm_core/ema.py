"""Moving averages of the weights, on the clock of images seen: by half-life, or by a power function of the time.

The power-function averages are those of Karras et al. 2024, "Analyzing and improving the training dynamics of
diffusion models" (section 3 and appendix C). At time t the weights of time τ <= t count with the profile
p(τ) = (γ + 1) / t (τ / t)^γ, whose relative width sigma_rel does not change as training goes on. From snapshots of a
few such averages, stored now and then, an average of another width, at another time, is put together after training.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def ema_decay(images_seen: int, batch: int, half_life: float, ramp_up: float | None = 0.05) -> float:
    """The factor that the average so far keeps in one update.

    images_seen: the clock after this batch, that is with its images counted. half_life: images after which a
    weight's share has halved. ramp_up: the half-life is at most this part of images_seen, so that a short run does
    not keep its initial noise; None for none (Karras et al. 2022, "Elucidating the design space of diffusion-based
    generative models", appendix F.2: half-life in images, ramp-up 0.05). ValueError for negative numbers and NaN.
    """
    if not (0 <= half_life < math.inf and 1 <= batch <= images_seen < math.inf):
        raise ValueError(
            "half_life >= 0 and images_seen >= batch >= 1, all finite, are needed, "
            f"not half_life {half_life}, images_seen {images_seen}, batch {batch}"
        )
    if ramp_up is not None and not 0 <= ramp_up < math.inf:
        raise ValueError(f"ramp_up must be 0 or more, and finite, or None for none, not {ramp_up}")
    half_life = _ramped(half_life, images_seen, ramp_up)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def _ramped(half_life: float, images_seen: int, ramp_up: float | None) -> float:
    return half_life if ramp_up is None else min(half_life, ramp_up * images_seen)


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of the profile with exponent gamma >= 0, relative to t (Karras et al. 2024, eq. 123)."""
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be 0 or more, and finite, not {gamma}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose relative standard deviation is sigma_rel, the inverse of `sigma_rel_of`.

    It is the largest root of (γ + 2)² (γ + 3) sigma_rel² = γ + 1 (Karras et al. 2024, eq. 126). ValueError outside
    (0, 1 / sqrt(12)]: at the upper end γ = 0 and all weights count alike, above it early ones would count for more.
    """
    if not 0 < sigma_rel <= 1 / math.sqrt(12):
        raise ValueError(f"sigma_rel must be above 0 and at most 1 / sqrt(12) = 0.2887, not {sigma_rel}")
    q = sigma_rel**-2
    # Newton's method from above the root, where the cubic is convex, falls towards it until rounding stops it.
    gamma, below = math.inf, 1 / sigma_rel
    while below < gamma:
        gamma = below
        below = gamma - (((gamma + 7) * gamma + 16 - q) * gamma + 12 - q) / ((3 * gamma + 14) * gamma + 16 - q)
    return max(gamma, 0.0)


def power_decay(images_seen: int, batch: int, gamma: float) -> float:
    """The factor that a power-function average so far keeps in one update: (1 - 1 / t)^(γ + 1), t in updates.

    images_seen: the clock after this batch, that is with its images counted, so that t = images_seen / batch; at the
    first update the factor is 0 and nothing is left of the initial weights (Karras et al. 2024, eq. 127). Each weight
    then counts with the integral of the profile over its batch's time, whatever the batches' sizes. ValueError unless
    images_seen >= batch >= 1 and gamma >= 0.
    """
    if not 1 <= batch <= images_seen < math.inf:
        raise ValueError(f"images_seen >= batch >= 1 is needed, not images_seen {images_seen}, batch {batch}")
    sigma_rel_of(gamma)  # refuse a bad gamma
    return (1 - batch / images_seen) ** (gamma + 1)


class _Average:
    """One average of a flat list of float32 tensors, updated in place.

    Its whole state is `tensors` (in the order given); the clock belongs to the caller. To resume, copy into them.

    Float32 sets a limit: where (1 - decay) times the distance to the weight is below half a unit in the average's last
    place, the update is lost, so that a slow average of resting weights stops within about |average| 2^-24 / (1 -
    decay) of them (7e-4 |average| at a half-life of 8,000 updates).
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        if any(value.dtype != torch.float32 for value in values):
            raise ValueError("an average is kept in float32: give it the float32 master weights")
        self.tensors = [value.detach().clone() for value in values]

    def decay(self, images_seen: int, batch: int) -> float:
        """The factor that the average so far keeps in one update."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, values: Sequence[Tensor], images_seen: int, batch: int) -> None:
        """average = decay average + (1 - decay) values, after the optimizer step that saw `batch` more images."""
        weight = 1 - self.decay(images_seen, batch)
        for average, value in zip(self.tensors, values, strict=True):
            average.lerp_(value.detach(), weight)


class Ema(_Average):
    """An average by half-life of a flat list of float32 tensors, updated in place.

    Its whole state is `tensors` (in the order given); the clock belongs to the caller. To resume, copy into them.
    """

    def __init__(self, values: Sequence[Tensor], half_life: float, ramp_up: float | None = 0.05) -> None:
        """Starts as a copy of `values`; half_life and ramp_up as in `ema_decay`."""
        ema_decay(1, 1, half_life, ramp_up)  # refuse a bad half-life now, not at the first update
        super().__init__(values)
        self.half_life = half_life
        self.ramp_up = ramp_up

    def half_life_at(self, images_seen: int) -> float:
        """Images after which a weight's share has halved, at this moment of the ramp-up."""
        return float(_ramped(self.half_life, images_seen, self.ramp_up))

    def decay(self, images_seen: int, batch: int) -> float:
        """`ema_decay` of this average."""
        return ema_decay(images_seen, batch, self.half_life, self.ramp_up)


class PowerEma(_Average):
    """A power-function average of a flat list of float32 tensors, updated in place.

    Its whole state is `tensors` (in the order given); the clock belongs to the caller. To resume, copy into them.
    """

    def __init__(self, values: Sequence[Tensor], sigma_rel: float) -> None:
        """Starts as a copy of `values`, of which the first update leaves nothing; sigma_rel as in `gamma_of`."""
        self.gamma = gamma_of(sigma_rel)
        super().__init__(values)
        self.sigma_rel = sigma_rel

    def decay(self, images_seen: int, batch: int) -> float:
        """`power_decay` of this average."""
        return power_decay(images_seen, batch, self.gamma)


def post_hoc_coefficients(
    stored: Sequence[tuple[float, float]], target_images: float, target_sigma_rel: float
) -> Tensor:
    """How much of each stored snapshot makes the average (target_images, target_sigma_rel): float64 [len(stored)].

    stored: (images_seen, sigma_rel) of each snapshot of a `PowerEma`. The coefficients add up to 1, and of those that
    do, they give the profile with the least squared distance from the target's (Karras et al. 2024, algorithm 3, with
    the sum as a constraint). `post_hoc_error` says how well that does: better the more snapshots there are of each
    width, and best for widths between those stored and a little outside them.

    ValueError for no snapshots, images that are not positive, a sigma_rel that is no width, and a target later than
    all snapshots.
    """
    gram, inner, _ = _inner_products(stored, target_images, target_sigma_rel)
    # Of profiles scaled to norm 1 the Gram matrix has the best condition; snapshots that say nearly the same (or are
    # given twice) still leave it singular, and then the smallest solution is taken.
    norm = gram.diagonal().sqrt()
    sides = torch.stack((inner / norm, 1 / norm), dim=1)
    solution = torch.linalg.lstsq(gram / norm / norm.unsqueeze(1), sides, rcond=1e-12, driver="gelsd").solution
    free, multiplier = (solution / norm.unsqueeze(1)).unbind(1)
    return free + (1 - free.sum()) / multiplier.sum() * multiplier


def post_hoc_error(
    stored: Sequence[tuple[float, float]], coefficients: Tensor, target_images: float, target_sigma_rel: float
) -> float:
    """Distance of the profile made with `coefficients` from the target's, relative to the target's norm.

    0 is exact, to within 1e-7, and below 0.01 means that the profiles look the same. Arguments as in
    `post_hoc_coefficients`.
    """
    gram, inner, target = _inner_products(stored, target_images, target_sigma_rel)
    squared = coefficients @ gram @ coefficients - 2 * coefficients @ inner + target
    return math.sqrt(max(0.0, squared.item()) / target.item())


def combine(snapshots: Iterable[Mapping[str, Tensor]], coefficients: Tensor) -> dict[str, Tensor]:
    """The sum of coefficient times snapshot, tensor by tensor: added up in float64, returned in float32.

    Snapshots are taken one at a time, so that an iterator over files needs the memory of one and of the sum.
    ValueError where their number is not that of the coefficients, or where names or shapes differ.
    """
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients.tolist(), strict=True):
        if not total:
            total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in snapshot.items()}
        for name in sorted(total.keys() | snapshot.keys()):
            if name not in total or name not in snapshot or total[name].shape != snapshot[name].shape:
                raise ValueError(f"a snapshot differs from the first one in {name!r}: names and shapes must agree")
            total[name].add_(snapshot[name].detach().double(), alpha=coefficient)
    return {name: value.float() for name, value in total.items()}


def _inner_products(
    stored: Sequence[tuple[float, float]], target_images: float, target_sigma_rel: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals over τ of products of profiles: stored with stored [S, S], with the target [S], the target's own [].

    Float64, in units of 1 / target_images. Of the profiles (t_a, γ_a) and (t_b, γ_b), with m the lesser time:
    (γ_a + 1) (γ_b + 1) / (γ_a + γ_b + 1) (m / t_a)^γ_a (m / t_b)^γ_b / max(t_a, t_b) (Karras et al. 2024, eq. 151).
    """
    if len(stored) == 0:
        raise ValueError("there are no stored snapshots to choose from")
    latest = max(images for images, _ in stored)
    if not (0 < target_images <= latest < math.inf and all(images > 0 for images, _ in stored)):
        raise ValueError(
            f"images must be above 0 and the target's, {target_images}, at most the latest snapshot's, {latest}"
        )
    t = torch.tensor([*(images / target_images for images, _ in stored), 1.0], dtype=torch.float64)
    widths = [*(sigma_rel for _, sigma_rel in stored), target_sigma_rel]
    gamma = torch.tensor([gamma_of(sigma_rel) for sigma_rel in widths], dtype=torch.float64)
    t_a, gamma_a = t.unsqueeze(1), gamma.unsqueeze(1)
    lesser = torch.minimum(t_a, t)
    overlap = (lesser / t_a) ** gamma_a * (lesser / t) ** gamma / torch.maximum(t_a, t)
    products = (gamma_a + 1) * (gamma + 1) / (gamma_a + gamma + 1) * overlap
    return products[:-1, :-1], products[:-1, -1], products[-1, -1]
