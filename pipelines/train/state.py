"""What a step changes: weights, optimizer, moving averages, the clock. A checkpoint holds all of it, and no more."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_core import Ema
from ddpm_core.ema import PowerEma
from pipelines.sections import Train
from pipelines.train.checkpoint import Checkpoint


class State:
    """One flat vector holds all weights, and the model's parameters are views of it.

    The optimizer and the averages then touch one tensor instead of hundreds.
    """

    def __init__(self, model: nn.Module, train: Train) -> None:
        self._train = train
        self.step = self.images = 0
        self.skipped = 0
        """Steps whose gradient was not finite: they moved the clock and nothing else."""
        self.skipped_in_a_row = 0
        """Of these, the last ones, if no other step came after them."""
        self._parameters = dict(model.named_parameters())
        self.weights = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self._parameters.values()]))
        self._optimizer = torch.optim.AdamW(
            [self.weights], lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
        )
        self._moments = {
            "step": torch.tensor(0.0, device=self.weights.device),
            "exp_avg": torch.zeros_like(self.weights),
            "exp_avg_sq": torch.zeros_like(self.weights),
        }
        self._optimizer.state[self.weights] = self._moments
        self._ema = Ema([self.weights.detach()], half_life=train.ema_half_life)
        self._profiles = {width: PowerEma([self.weights.detach()], width) for width in train.ema_profiles}
        for name, view in self._named(self.weights.detach()).items():
            self._parameters[name].data = view

    def advance(self, gradient: Tensor, learning_rate: float) -> None:
        """One optimizer step; the clock moves by a batch, and the averages with it."""
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self.weights.grad = gradient
        self._optimizer.step()
        self.skipped_in_a_row = 0
        self._move_clock()

    def skip(self) -> None:
        """A step without the optimizer's; the averages go on towards the weights as they are."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._move_clock()

    def _move_clock(self) -> None:
        batch = self._train.global_batch
        self.step += 1
        self.images += batch
        for average in (self._ema, *self._profiles.values()):
            average.update([self.weights], self.images, batch)

    @property
    def ema_half_life(self) -> float:
        """Half-life of the moving average at its last update, in images: it rises to `train.ema_half_life`."""
        return self._ema.half_life_at(self.images)

    def checkpoint(self, environment: Mapping[str, Any]) -> Checkpoint:
        """A copy of the whole state, on the CPU, tensors keyed by parameter name."""
        moments = ("exp_avg", "exp_avg_sq")
        return Checkpoint(
            step=self.step,
            images=self.images,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            model=self._named(_copy(self.weights)),
            ema=self._named(_copy(self._ema.tensors[0])),
            optimizer={k: v for m in moments for k, v in self._named(_copy(self._moments[m]), f"{m}.").items()},
            profiles=self.profiles(),
            environment=environment,
        )

    def average(self) -> dict[str, Tensor]:
        """The moving average by parameter name, as it is: no copy."""
        return self._named(self._ema.tensors[0])

    def profiles(self) -> dict[float, dict[str, Tensor]]:
        """A copy of the power-function averages, by their sigma_rel."""
        return {width: self._named(_copy(average.tensors[0])) for width, average in self._profiles.items()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.step, self.images = checkpoint.step, checkpoint.images
        self.skipped, self.skipped_in_a_row = checkpoint.skipped, checkpoint.skipped_in_a_row
        self.weights.copy_(self._flat(checkpoint.model))
        self._ema.tensors[0].copy_(self._flat(checkpoint.ema))
        for width, average in self._profiles.items():
            average.tensors[0].copy_(self._flat(checkpoint.profiles[width]))
        self._moments["step"].fill_(float(checkpoint.step - checkpoint.skipped))
        for moment in ("exp_avg", "exp_avg_sq"):
            self._moments[moment].copy_(self._flat(checkpoint.optimizer, f"{moment}."))

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with other weights than the initial ones. ValueError where they are not this model's."""
        theirs = {name: tuple(value.shape) for name, value in weights.items()}
        ours = {name: tuple(value.shape) for name, value in self._parameters.items()}
        if theirs != ours:
            differing = sorted(set(theirs.items()) ^ set(ours.items()))
            raise ValueError(
                f"the weights are another model's: {differing[0][0]} differs, and {len(differing) - 1} more"
            )
        flat = self._flat(weights)
        for vector in (self.weights, *self._ema.tensors, *(p.tensors[0] for p in self._profiles.values())):
            vector.copy_(flat)

    def _named(self, flat: Tensor, prefix: str = "") -> dict[str, Tensor]:
        pieces = flat.split([p.numel() for p in self._parameters.values()])
        named = zip(self._parameters.items(), pieces, strict=True)
        return {prefix + name: piece.view(p.shape) for (name, p), piece in named}

    def _flat(self, named: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        return torch.cat([named[prefix + name].reshape(-1) for name in self._parameters])


def _copy(flat: Tensor) -> Tensor:
    return torch.clone(flat.detach()).cpu()
