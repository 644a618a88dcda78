"""Where a step's numbers stop being finite: which layer, at which timesteps, of which images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 4


@dataclass(frozen=True)
class SlotInputs:
    """What one slot's losses were computed of."""

    names: Sequence[str]
    """Of the images [N]."""
    timesteps: Tensor
    """[N]."""
    losses: Callable[[], Tensor]
    """Computes them again: [N]."""


def diagnose(model: nn.Module, slots: Sequence[SlotInputs]) -> str | None:
    """One sentence about the first of these slots whose losses or gradients are not finite; None where all are."""
    for slot in slots:
        layers: list[str] = []
        hooks = [
            module.register_forward_hook(_noting(name, layers))
            for name, module in model.named_modules()
            if not list(module.children())
        ]
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled network runs no hooks
                losses = slot.losses()
        finally:
            for hook in hooks:
                hook.remove()
        model.zero_grad(set_to_none=True)
        losses.mean().backward()
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        gradients = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        model.zero_grad(set_to_none=True)
        if bad:
            where = f"first in the output of {layers[0]}" if layers else "in the loss, of outputs that are finite"
            images = [f"{slot.names[i]} at t = {int(slot.timesteps[i])}" for i in bad[:_SHOWN]]
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            return f"{where}, for {', '.join(images)}{more}"
        if gradients:
            return f"in the gradient of {gradients[-1]}, of losses that are finite"
    return None


def _noting(name: str, layers: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            layers.append(name)

    return hook
