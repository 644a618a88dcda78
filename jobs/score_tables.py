"""Scores as a person reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.console import console, table_of
from pipelines.evaluate.compare import Comparison
from pipelines.evaluate.study import Study, said


def show_scores(scores: Sequence[Mapping[str, Any]], evidence: Mapping[str, float], pairs: str = "") -> None:
    """Scores with what real images have, and the figures beside which they mean something."""
    found = table_of(
        ("score", "left"),
        ("value", "right"),
        ("95 % interval", "right"),
        ("real images", "right"),
        ("measured on", "left"),
    )
    for score in scores:
        low, high = score["interval"]
        floor = score["provenance"].get("floor")
        found.add_row(
            score["name"],
            f"{score['value']:.4g}",
            f"{low:.4g} to {high:.4g}",
            "" if floor is None else f"{floor:.4g}",
            _measured(score, evidence),
        )
    if (noise := evidence.get("noise_over_floor")) is not None:
        noise_value = noise * evidence["frechet_floor"]
        found.add_row("frechet of noise", f"{noise_value:.4g}", "", "", f"{noise:.0f} floors; uniform noise")
    if (accuracy := evidence.get("feature_accuracy")) is not None:
        found.add_row("features", f"{accuracy:.4g}", "", "", "accuracy of their network on the held-out images")
    if (accuracy := evidence.get("feature_turns_accuracy")) is not None:
        found.add_row("features", f"{accuracy:.4g}", "", "", "of turned held-out images, those whose turn is told")
    if seen := evidence.get("held_out_seen"):
        found.add_row("held-out images seen", f"{seen:,.0f}", "", "", "in training by the model")
    console().print(found)
    if pairs:
        console().print(f"nearest to training images   {pairs}")


def show_comparison(compared: Sequence[Comparison], picture: str | None) -> None:
    """Which of two is better, by each score."""
    found = table_of(("score", "left"), ("first", "right"), ("second", "right"), ("better", "left"))
    for one in compared:
        verdict: str = one.verdict
        if one.differs:
            fields = "; ".join(f"{name} {a} against {b}" for name, (a, b) in one.differs.items())
            verdict = f"not comparable: {fields}"
        found.add_row(one.name, f"{one.first:.4g}", f"{one.second:.4g}", verdict)
    console().print(found)
    if picture is not None:
        console().print(f"images of both, the first above   {picture}")


def show_study(study: Study) -> None:
    """Every way of drawing, the best, and the cheapest that is as good."""
    found = table_of(
        ("way", "left"), ("calls", "right"), ("Frechet", "right"), ("95 % interval", "right"), ("", "left")
    )
    for way in sorted(study.ways, key=lambda way: (way.calls, way.score.value)):
        low, high = way.score.interval
        marks = ["best"] if way is study.best else []
        marks += ["cheapest within the best's interval"] if way is study.cheapest else []
        row = (said(way.setting), f"{way.calls:,}", f"{way.score.value:.4g}", f"{low:.4g} to {high:.4g}")
        found.add_row(*row, ", ".join(marks))
    console().print(found)
    floor, n = (study.ways[0].score.provenance[name] for name in ("floor", "n"))
    console().print(f"real images score {floor:.4g}; n = {n}, network calls are those of one image")
    console().print(f"picture   {study.picture}")


def _measured(score: Mapping[str, Any], evidence: Mapping[str, float]) -> str:
    facts, name = score["provenance"], score["name"]
    if name == "bits_per_dim":
        how = "all timesteps"
        if facts["estimate"] == "bounded":
            how = f"estimate from {facts['timesteps_per_image']} timesteps each"
        return f"{facts['n']} {facts['split']} images, {how}"
    if name == "frechet":
        return f"{evidence['frechet_over_floor']:.2f} floors; {facts['n']} samples and {facts['split']} images"
    if name.startswith("near_training"):
        return f"{facts['samples']} samples, {facts['trained_on']:,} training images, {facts['copies']} exact copies"
    if name == "class_agreement":
        return f"{facts['samples']} samples, of the classes that they were drawn for"
    return f"{facts['n']} samples and {facts['split']} images"
