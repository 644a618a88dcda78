"""What a person reads when a verb is over."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.console import console, table_of
from jobs.score_tables import show_scores
from pipelines.pipeline import Result
from pipelines.tracking.reconcile import Reconciled


def show_run(result: Result, ui_command: str) -> None:
    """The end of the main job: scores, champion, where the pictures lie, how to see more."""
    out = console()
    promoted = bool(result.decision and result.decision["promoted"])
    if promoted and not result.steps_done:
        out.print("Nothing to do: every step of this spec is done.")
    show_scores(result.scores, result.evidence)
    if result.champion != result.version:
        out.print(f"version    {result.name} version {result.version}, not the champion")
    champion = f"{result.name} version {result.champion}" if result.champion else f"{result.name} has none"
    earlier = ", by the earlier decision" if result.champion == result.version and not promoted else ""
    out.print(f"champion   {champion}{earlier}")
    out.print(f"samples    {result.samples['n']:,} images in {result.samples['out']}")
    out.print(f"pictures   {result.grid}")
    out.print(f"run        {result.folder}")
    out.print(f"MLflow     {ui_command}")


def show_certificate(told: Mapping[str, Any]) -> None:
    """Whether a run that was killed came to the same bits."""
    out = console()
    table = table_of(
        ("kill", "right"), ("workers", "right"), ("rank", "right"), ("at step", "right"), ("steps lost", "right")
    )
    for number, kill in enumerate(told["kills"], 1):
        table.add_row(*map(str, (number, kill["workers"], kill["rank"], kill["at_step"], kill["lost"])))
    out.print(table)
    turns = ", ".join(map(str, told["workers"]))
    verdict = "the same bits" if told["same"] else f"OTHER bits in {', '.join(told['differs'])}"
    out.print(f"verdict    {verdict} after {told['steps']} steps: weights, average, optimizer, journal")
    out.print(f"workers    {turns}, one after the other, against {told['undisturbed_workers']} undisturbed")
    out.print(f"weights    {told['digests']['model.safetensors']}")
    out.print(f"kept       {told['place']}")


def show_sweep(outputs: Mapping[str, Any]) -> None:
    """The ranking of a sweep."""
    table = table_of(
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
    out = console()
    out.print(table)
    out.print("Ranked by bits/dim on the held-out images: training losses of different schedules do not compare.")
    out.print(f"winner     {outputs['winner']}")


def show_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Registered models, a version a line."""
    table = table_of(*((column, "left") for column in ("model", "version", "aliases", "model digest", "run")))
    for model in models:
        for version in model["versions"]:
            tags = version["tags"]
            digest, run = tags.get("model_digest", "")[:12], tags.get("run", "")
            table.add_row(model["name"], str(version["version"]), ", ".join(version["aliases"]), digest, run)
    console().print(table)


def show_reconciled(done: Sequence[Reconciled]) -> None:
    """Runs, and what their trackers got now."""
    if not done:
        console().print("no run there was to be told to a tracker")
        return
    table = table_of(("run", "left"), ("steps sent", "right"), ("tracker", "left"), ("", "left"))
    for told in done:
        table.add_row(told.run, f"{told.steps:,}", told.tracker, told.error or "has all")
    console().print(table)
