"""What a person reads when a verb is over."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.pipeline import Result


def show_run(result: Result, ui_command: str) -> None:
    """The end of the main job: scores, champion, where the pictures lie, how to see more."""
    console = Console(highlight=False, soft_wrap=True)
    if not result.steps_done:
        console.print("Nothing to do: every step of this spec is done.")
    show_scores(result.scores)
    console.print(f"champion   {result.name} version {result.version}")
    console.print(f"samples    {result.samples['n']:,} images in {result.samples['out']}")
    console.print(f"pictures   {result.grid}")
    console.print(f"run        {result.folder}")
    console.print(f"MLflow     {ui_command}")


def show_scores(scores: Sequence[Mapping[str, Any]]) -> None:
    """Scores with what they were measured on."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("score", "left"), ("value", "right"), ("95 % interval", "right"), ("measured", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for score in scores:
        interval = score.get("interval")
        between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        table.add_row(score["name"], f"{score['value']:.4g}", between, score.get("note", ""))
    Console(highlight=False).print(table)


def show_sweep(outputs: Mapping[str, Any]) -> None:
    """The ranking of a sweep."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("rank", "right"),
        ("setting", "left"),
        ("bits/dim", "right"),
        ("Frechet", "right"),
        ("images", "right"),
        ("", "left"),
        ("run", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for place, trial in enumerate(outputs["ranking"], start=1):
        frechet = "" if trial["frechet"] is None else f"{trial['frechet']:.3g}"
        end = trial["error"] or ("" if trial["finished"] else "stopped early")
        figures = (f"{trial['bits_per_dim']:.4f}", frechet, f"{trial['images']:,}", end, trial["run"])
        table.add_row(str(place), trial["setting"], *figures)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print("Ranked by bits/dim on the held-out images: training losses of different schedules do not compare.")
    console.print(f"winner     {outputs['winner']}")


def show_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Registered models, a version a line."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "version", "aliases", "model digest", "run"):
        table.add_column(column)
    for model in models:
        for version in model["versions"]:
            tags = version["tags"]
            digest, run = tags.get("model_digest", "")[:12], tags.get("run", "")
            table.add_row(model["name"], str(version["version"]), ", ".join(version["aliases"]), digest, run)
    Console(highlight=False).print(table)
