"""What is asked of inputs, in one place: ValueErrors that say what was given and what is allowed."""

import operator
import sys
from typing import Any

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """NaN or an infinity where numbers are needed: bad input, or the work of a network that diverged."""


def checked_integer(value: Any, name: str) -> int:
    """The value as an int; ValueError for what is none, True and 2.0 included."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be an integer, not {value!r}")


def checked_timesteps(t: Tensor, timesteps: int) -> Tensor:
    """t as int64 [N]; ValueError unless it is a tensor of integers in 1..timesteps, [N] or []."""
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.ndim > 1:
        given = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"t must be an integer tensor with one timestep an image, [N], not {given}")
    t = t.reshape(-1).long()  # as an index, uint8 would be a mask
    low, high = (int(bound) for bound in t.aminmax()) if len(t) else (1, 1)
    if low < 1 or high > timesteps:  # 0 would silently read a table's other end
        raise ValueError(f"t must lie in 1..{timesteps}, not in {low}..{high}")
    return t


def check_images(images: Tensor) -> None:
    """ValueError for pixels that are integers, which the coefficients would be rounded to, and for no images."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor in [-1, 1] (8-bit pixels / 127.5 - 1), not {given}")
    if images.ndim == 0 or len(images) == 0:
        raise ValueError(f"there are no images: {list(images.shape)}")


def check_same_shape(images: Tensor, other: Tensor) -> None:
    """Else they would be broadcast against each other, into numbers that mean nothing: ValueError."""
    if images.shape != other.shape:
        raise ValueError(
            f"what goes with the images must have their shape {list(images.shape)}, not {list(other.shape)}"
        )


def check_finite(images: Tensor) -> None:
    """NotFiniteError for NaN and infinities."""
    if not images.isfinite().all():
        raise NotFiniteError("the images or the noise hold values that are not finite")


def callers_level() -> int:
    """As a warning's `stacklevel` where it is warned: the first caller outside this package."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level
