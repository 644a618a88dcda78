"""Options that were given and have no effect: each is said in one line, none is refused.

An option at its default counts as not given: a recorded spec has every default written out.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pipelines.data.order import owners
from pipelines.sections import Evaluate, Model, Train

if TYPE_CHECKING:
    from pipelines.spec import Spec


def without_effect(spec: "Spec") -> list[str]:
    """What of a spec changes nothing, because of what else it says."""
    return [
        *_of_model(spec.model),
        *_of_training(spec.train, spec.model),
        *_of_sampling(spec),
        *_of_evaluation(spec.evaluate),
    ]


def warn_without_effect(spec: "Spec", said: Collection[str] = ()) -> None:
    """A warning for each option of a spec that changes nothing, but for those that were `said` before."""
    for line in without_effect(spec):
        if line not in said:
            warnings.warn(line, stacklevel=3)


def warn_unused(overrides: Sequence[str], used: Sequence[str], verb: str) -> None:
    """A warning for each override of a model's spec on which a verb does not depend.

    used: the fields and sections on which it does.
    """
    for override in overrides:
        name = override.partition("=")[0]
        if not any(f"{name}.".startswith(f"{field}.") for field in used):
            warnings.warn(f"--set {override}: has no effect on {verb}", stacklevel=3)


OF_BITS = ("bits_images", "bits_timesteps", "exact")
"""Fields of `evaluate` that only bits/dim depend on."""
OF_A_MODEL = ("keep_samples", *OF_BITS)
"""Fields of `evaluate` that images which are there do not depend on."""


def warn_unused_by_study(overrides: Sequence[str], varied: Collection[str]) -> None:
    """A warning for each override of a model's spec that a study does not depend on, which varies these fields of
    `sample`."""
    _warn_of_fields(overrides, [f"evaluate.{name}" for name in OF_BITS], "--grid, which takes no bits/dim")
    _warn_of_fields(overrides, [f"sample.{name}" for name in varied], "--grid, which varies it")


def warn_unused_by_images(overrides: Sequence[str], evaluate: Evaluate) -> None:
    """A warning for each override that is for a model, where images are scored, and for what else has no effect."""
    _warn_of_fields(overrides, [f"evaluate.{name}" for name in OF_A_MODEL], "images that are there")
    for line in _of_evaluation(evaluate):
        if not line.startswith(tuple(f"evaluate.{name}:" for name in OF_A_MODEL)):
            warnings.warn(line, stacklevel=3)


def _warn_of_fields(overrides: Sequence[str], fields: Sequence[str], what: str) -> None:
    for name in dict.fromkeys(override.partition("=")[0] for override in overrides):
        if name in fields:  # by its name alone: some have an option of their own
            warnings.warn(f"{name}: has no effect on {what}", stacklevel=4)


def _of_model(model: Model) -> list[str]:
    lines = []
    if model.head_channels is not None and not model.attention and not model.mid_attention:
        lines.append("model.head_channels: has no effect without model.attention or model.mid_attention")
    if model.classes is None and not model.null_class:
        lines.append("model.null_class: has no effect without model.classes")
    return lines


def _of_training(train: Train, model: Model) -> list[str]:
    lines = []
    if model.classes is None and train.label_dropout != Train.model_fields["label_dropout"].default:
        lines.append("train.label_dropout: has no effect without model.classes")
    if twice := sorted({width for width in train.ema_profiles if train.ema_profiles.count(width) > 1}):
        lines.append(f"train.ema_profiles: {twice[0]:g} is there more than once, and kept once")
    if train.ema_snapshot_every is not None and not train.ema_profiles:
        lines.append("train.ema_snapshot_every: has no effect without train.ema_profiles")
    for workers in sorted({train.least_workers, train.most_workers}):
        if idle := workers - owners(workers, train.slots):
            lines.append(
                f"train.workers: {workers} do not divide train.slots = {train.slots}: {idle} of them would "
                "have nothing to do"
            )
    total = train.total_steps * train.global_batch
    if train.score is not None and (train.score.every_images or 0) > total:
        lines.append(f"train.score.every_images: no score is taken, the run ends at {total} images")
    if train.plateau is not None and train.plateau.patience_images >= total:
        lines.append(f"train.plateau: has no effect, the run ends at {total} images")
    if train.keep_every is not None and train.keep_every % train.checkpoint_every:
        both = math.lcm(train.keep_every, train.checkpoint_every)
        lines.append(
            f"train.keep_every: checkpoints are written every {train.checkpoint_every} steps, of which those at "
            f"multiples of {both} are kept"
        )
    return lines


def _of_evaluation(evaluate: Evaluate) -> list[str]:
    given = {name for name, field in Evaluate.model_fields.items() if getattr(evaluate, name) != field.default}
    lines = []
    if evaluate.exact and "bits_timesteps" in given:
        lines.append("evaluate.bits_timesteps: has no effect with evaluate.exact, which takes all")
    if evaluate.inception is not None:
        lines += [
            f"evaluate.{name}: has no effect with evaluate.inception, which is trained already"
            for name in ("feature_width", "feature_epochs")
            if name in given
        ]
    return lines


def _of_sampling(spec: "Spec") -> list[str]:
    variance, sampler = spec.diffusion.variance, spec.sample.sampler
    if variance == "small" or sampler == "ancestral":
        return []
    return [
        f"diffusion.variance: {variance} has no effect on samples by {sampler}; the ancestral sampler draws with it"
    ]
