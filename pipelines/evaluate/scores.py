"""A score and where it comes from: a number without its provenance does not exist here."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.store import DamageError

FORMAT = 1

FRECHET, KID = "frechet", "kid"
PRECISION, RECALL, DENSITY, COVERAGE = "precision", "recall", "density", "coverage"
BITS_PER_DIM = "bits_per_dim"
NEAR_FEATURES, NEAR_PIXELS = "near_training_in_features", "near_training_in_pixels"
AGREEMENT = "class_agreement"
NOISE = "noise"
"""No score: the Frechet distance of uniform noise."""

MORE_IS_BETTER = {PRECISION, RECALL, DENSITY, COVERAGE, AGREEMENT}
"""Of the others less is."""

_OF_SETS = ("n", "features_digest", "preprocessing", "split", "dataset_digest")
DECIDING = {
    **dict.fromkeys((FRECHET, KID), _OF_SETS),
    **dict.fromkeys((PRECISION, RECALL, DENSITY, COVERAGE), (*_OF_SETS, "neighbours")),
    BITS_PER_DIM: ("n", "preprocessing", "split", "dataset_digest", "estimate", "given"),
    NEAR_FEATURES: ("features_digest", "preprocessing", "dataset_digest", "share"),
    NEAR_PIXELS: ("dataset_digest", "share"),
    AGREEMENT: ("features_digest", "preprocessing", "dataset_digest"),
}
"""By score, the fields that change what it measures: where they differ, two scores are of different things.

The others say what was measured (model, sampler, steps), which may well differ, or with which random draws, which
the interval accounts for.
"""


@dataclass(frozen=True)
class Score:
    """One number that says how good samples or a model are, with all that it takes to compare it."""

    name: str
    """One of those above."""
    value: float
    interval: tuple[float, float]
    """95 % interval."""
    provenance: Mapping[str, Any]
    """Plain values by field: see `DECIDING`, and what `frechet_score` and `bits_score` write."""

    @property
    def in_floors(self) -> float:
        """The value over the floor, the same score of real images. ValueError for a score without one."""
        if "floor" not in self.provenance:
            raise ValueError(f"the score {self.name} has no floor")
        floor = self.provenance["floor"]
        return self.value / floor if floor > 0 else math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values, with a format version."""
        return {
            "format": FORMAT,
            "name": self.name,
            "value": self.value,
            "interval": list(self.interval),
            "provenance": dict(self.provenance),
        }

    @staticmethod
    def from_json(record: Any) -> "Score":
        """The inverse of `to_json`. DamageError for another format, or a record that is no score."""
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            found = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise DamageError(f"a score has format {found}, not {FORMAT}")
        try:
            low, high = record["interval"]
            return Score(record["name"], float(record["value"]), (low, high), dict(record["provenance"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(f"a score's record is damaged: {error!r}") from None

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_json()).encode()

    @staticmethod
    def of_bytes(data: bytes) -> "Score":
        """The inverse of `to_bytes`. DamageError as by `from_json`."""
        return Score.from_json(json.loads(data))


@dataclass(frozen=True)
class Floors:
    """What real images score against real ones, by score, and uniform noise: the same for whatever model is scored."""

    n: int
    """Images of each side."""
    floors: Mapping[str, float]
    """By name of the score."""
    noise: float
    """Frechet distance of uniform noise from real images."""

    @staticmethod
    def joined(n: int, parts: Iterable[Mapping[str, float]]) -> "Floors":
        """Of floors by score, and of noise by NOISE, that were worked out in parts."""
        found = {name: value for part in parts for name, value in part.items()}
        return Floors(n, {name: value for name, value in found.items() if name != NOISE}, found[NOISE])


def comparable(a: Score, b: Score) -> list[str]:
    """The fields that forbid to compare two scores; empty where they may be compared.

    A deciding field that either lacks is among them: what is not known to be equal is not.
    """
    if a.name != b.name:
        return ["name"]
    missing = object()
    deciding = DECIDING.get(a.name, tuple(sorted({*a.provenance, *b.provenance})))
    return [
        field
        for field in deciding
        if a.provenance.get(field, missing) != b.provenance.get(field, missing) or field not in a.provenance
    ]
