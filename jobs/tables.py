"""What a person reads when a verb is over."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pipelines.pipeline import Result
from pipelines.tracking.reconcile import Reconciled


def show_run(result: Result, ui_command: str) -> None:
    """The end of the main job: scores, champion, where the pictures lie, how to see more."""
    console = _console()
    promoted = bool(result.decision and result.decision["promoted"])
    if promoted and not result.steps_done:
        console.print("Nothing to do: every step of this spec is done.")
    show_scores(result.scores, result.evidence)
    if result.champion != result.version:
        console.print(f"version    {result.name} version {result.version}, not the champion")
    champion = f"{result.name} version {result.champion}" if result.champion else f"{result.name} has none"
    earlier = ", by the earlier decision" if result.champion == result.version and not promoted else ""
    console.print(f"champion   {champion}{earlier}")
    console.print(f"samples    {result.samples['n']:,} images in {result.samples['out']}")
    console.print(f"pictures   {result.grid}")
    console.print(f"run        {result.folder}")
    console.print(f"MLflow     {ui_command}")


def show_certificate(told: Mapping[str, Any]) -> None:
    """Whether a run that was killed came to the same bits."""
    console = _console()
    table = _table(
        ("kill", "right"), ("workers", "right"), ("rank", "right"), ("at step", "right"), ("steps lost", "right")
    )
    for number, kill in enumerate(told["kills"], 1):
        table.add_row(*map(str, (number, kill["workers"], kill["rank"], kill["at_step"], kill["lost"])))
    console.print(table)
    turns = ", ".join(map(str, told["workers"]))
    verdict = "the same bits" if told["same"] else f"OTHER bits in {', '.join(told['differs'])}"
    console.print(f"verdict    {verdict} after {told['steps']} steps: weights, average, optimizer, journal")
    console.print(f"workers    {turns}, one after the other, against {told['undisturbed_workers']} undisturbed")
    console.print(f"weights    {told['digests']['model.safetensors']}")
    console.print(f"kept       {told['place']}")


def show_scores(scores: Sequence[Mapping[str, Any]], evidence: Mapping[str, float]) -> None:
    """Scores with what they were measured on, and the figures beside which they mean something."""
    table = _table(("score", "left"), ("value", "right"), ("95 % interval", "right"), ("measured on", "left"))
    for score in scores:
        low, high = score["interval"]
        table.add_row(score["name"], f"{score['value']:.4g}", f"{low:.4g} to {high:.4g}", _measured(score, evidence))
        if score["name"] == "frechet":
            n, floor = score["provenance"]["n"], evidence["frechet_floor"]
            noise, accuracy = evidence["noise_over_floor"], evidence["feature_accuracy"]
            table.add_row("  its floor", f"{floor:.4g}", "", f"real images against real images, n = {n}")
            table.add_row("  of noise", f"{noise * floor:.4g}", "", f"{noise:.0f} floors; uniform noise, n = {n}")
            table.add_row("  features", f"{accuracy:.4g}", "", "accuracy of their network on the held-out images")
    _console().print(table)


def _measured(score: Mapping[str, Any], evidence: Mapping[str, float]) -> str:
    facts = score["provenance"]
    if score["name"] == "frechet":
        return f"{evidence['frechet_over_floor']:.2f} floors; {facts['n']} samples and {facts['split']} images"
    return f"{facts['n']} {facts['split']} images, estimate from {facts['timesteps_per_image']} timesteps each"


def show_sweep(outputs: Mapping[str, Any]) -> None:
    """The ranking of a sweep."""
    table = _table(
        ("rank", "right"),
        ("setting", "left"),
        ("bits/dim", "right"),
        ("Frechet", "right"),
        ("images", "right"),
        ("", "left"),
        ("run", "left"),
    )
    for place, trial in enumerate(outputs["ranking"], start=1):
        frechet = "" if trial["frechet"] is None else f"{trial['frechet']:.3g}"
        end = trial["error"] or ("" if trial["finished"] else "stopped early")
        figures = (f"{trial['bits_per_dim']:.4f}", frechet, f"{trial['images']:,}", end, trial["run"])
        table.add_row(str(place), trial["setting"], *figures)
    console = _console()
    console.print(table)
    console.print("Ranked by bits/dim on the held-out images: training losses of different schedules do not compare.")
    console.print(f"winner     {outputs['winner']}")


def show_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Registered models, a version a line."""
    table = _table(*((column, "left") for column in ("model", "version", "aliases", "model digest", "run")))
    for model in models:
        for version in model["versions"]:
            tags = version["tags"]
            digest, run = tags.get("model_digest", "")[:12], tags.get("run", "")
            table.add_row(model["name"], str(version["version"]), ", ".join(version["aliases"]), digest, run)
    _console().print(table)


def show_reconciled(done: Sequence[Reconciled]) -> None:
    """Runs, and what their trackers got now."""
    if not done:
        _console().print("no run there was to be told to a tracker")
        return
    table = _table(("run", "left"), ("steps sent", "right"), ("tracker", "left"), ("", "left"))
    for told in done:
        table.add_row(told.run, f"{told.steps:,}", told.tracker, told.error or "has all")
    _console().print(table)


def _table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, (name, justify) in enumerate(columns, start=1):
        # In a narrow window the last column, prose, folds; a number is never cut.
        table.add_column(name, justify=justify, no_wrap=position < len(columns), overflow="fold")
    return table


def _console() -> Console:
    # A log has no width; a terminal too narrow for a line wraps it itself.
    return Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 160)
