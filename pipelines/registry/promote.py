"""Promotion to `champion`: only with evidence, only through the gates, and always with a record of the decision."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.errors import Refused, UserError
from pipelines.registry.register import CHAMPION, client, download, find_version, list_models
from pipelines.spec import Gates
from pipelines.store import Place

FORMAT = 1
EVIDENCE = "evidence"
"""Tag of a version that holds its scores, as JSON."""


@dataclass(frozen=True)
class Verdict:
    """What one gate found."""

    gate: str
    value: float | None
    """None where the evidence is missing, which no gate passes."""
    limit: float
    passed: bool

    def __str__(self) -> str:
        value = "no evidence" if self.value is None else f"{self.value:.4g}"
        return f"{self.gate}: {value} (limit {self.limit:.4g}) {'passed' if self.passed else 'FAILED'}"


def judge(evidence: Mapping[str, float | None], gates: Gates) -> list[Verdict]:
    """Every gate's verdict on a version's evidence."""
    verdicts = []
    fit = ("feature_accuracy", gates.feature_accuracy, False)
    if "feature_accuracy" not in evidence and "noise_over_floor" in evidence:  # of a network that knows no classes
        fit = ("noise_over_floor", gates.noise_over_floor, False)
    for gate, limit, at_most in (("frechet_over_floor", gates.frechet_over_floor, True), fit):
        value = evidence.get(gate)
        # Written so that a not-a-number fails.
        passed = value is not None and (value <= limit if at_most else value >= limit)
        verdicts.append(Verdict(gate, value, limit, passed))
    return verdicts


def promote(name: str, version: str, gates: Gates, tracking_uri: str, store: Place) -> dict[str, Any]:
    """Give a version the alias `champion` if every gate passes; returns the decision record.

    The record is kept in the store and on the version, also where the answer is no. Refused names the gates that
    failed.
    """
    registry = client(tracking_uri)
    found = find_version(name, version, tracking_uri)
    previous = _champion(name, tracking_uri)
    verdicts = judge(json.loads(found.tags.get(EVIDENCE, "{}")), gates)
    promoted = all(v.passed for v in verdicts)
    decision: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "version": int(found.version),
        "previous_champion": previous,
        "verdicts": [asdict(v) for v in verdicts],
        "promoted": promoted,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if promoted:
        if _champion(name, tracking_uri) != previous:
            raise Refused(f"{name}: somebody else moved the alias {CHAMPION} meanwhile, look again")
        registry.set_registered_model_alias(name, CHAMPION, found.version)
    stamp = decision["time"].replace(":", "").replace("+0000", "Z")
    place = store / "decisions" / f"{name}-v{found.version}-{stamp}-{secrets.token_hex(2)}.json"
    place.write_json(decision)
    registry.set_model_version_tag(name, found.version, "decision", json.dumps(decision))
    if not promoted:
        failed = "; ".join(str(v) for v in verdicts if not v.passed)
        raise Refused(f"{name} version {found.version} is not promoted: {failed}", decision)
    return decision


def promote_by_name(name: str, version: int | None, tracking_uri: str, store: Place) -> dict[str, Any]:
    """Promote a version (by default the newest) through the gates of the spec it was trained by."""
    if "@" in name:
        name, _, given = name.partition("@")
        raise UserError(f"{name}@{given}: promote takes the name alone: {name} --version {given}")
    if version is None:
        version = list_models(tracking_uri, name)[0]["versions"][-1]["version"]
    gates = download(name, str(version), tracking_uri).spec.promote
    return promote(name, str(version), gates, tracking_uri, store)


def _champion(name: str, tracking_uri: str) -> int | None:
    try:
        return int(find_version(name, CHAMPION, tracking_uri).version)
    except UserError:
        return None
