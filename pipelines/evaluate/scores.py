"""A score and where it comes from: a number without its provenance does not exist here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1

FREE = frozenset({"model_digest", "sampler", "steps", "eta", "ema", "sample_seed", "floor", "noise_floors"})
"""Provenance in which two comparable scores may differ: it says what was scored, not how."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of merit."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    """95 %."""
    note: str = ""
    """In a few words, what was measured on what."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "interval": list(self.interval) if self.interval else None}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Score":
        """The inverse of `to_json`. ValueError for another format."""
        if fields.get("format") != FORMAT:
            raise ValueError(f"score format {fields.get('format')} is not known here, only {FORMAT}")
        rest = {name: value for name, value in fields.items() if name not in ("format", "interval")}
        interval = fields["interval"]
        return Score(**rest, interval=(interval[0], interval[1]) if interval else None)


def differences(a: Score, b: Score) -> list[str]:
    """Fields in which two scores were measured differently; none where they can be compared."""
    if a.name != b.name:
        return ["name"]
    names = (a.provenance.keys() | b.provenance.keys()) - FREE
    return sorted(name for name in names if a.provenance.get(name) != b.provenance.get(name))
