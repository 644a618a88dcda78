"""What a person reads about a dataset."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.data.diff import Difference
from pipelines.data.manifest import SPLITS
from pipelines.data.sources.files import printable
from pipelines.data.verify import Verification
from pipelines.progress import counted, plain

_FINDINGS = 50
_CLASSES = 40
_SHUFFLE = {
    "shards": "{found:.1f} shards in a batch, {uniform:.1f} in one of a uniform shuffle",
    "displacement": "an image moves by {found:.3f} of the epoch from disk to training, by {uniform:.3f} if uniformly",
    "classes": "the classes of a batch vary as in a uniform one of {found:.0f}",
}


def show_info(told: Mapping[str, Any]) -> None:
    """A dataset's card and how well it will be shuffled."""
    splits, kind = {name: told["splits"][name] for name in SPLITS}, {1: "grey", 3: "RGB"}[told["channels"]]
    print(f"dataset    {told['dataset']}")
    print(f"digest     {told['digest']}")
    print(f"source     {printable(told['source']['kind'])} {printable(told['source']['name'])}")
    print(f"images     {told['image_size']} x {told['image_size']} {kind}, {told['bytes'] / 2**20:,.1f} MiB in tars")
    if told["tars"] is not None:
        print(f"tars       {printable(told['tars'])}, images read to {told['decode']}")
    for name in ("mean", "std"):
        print(f"{name:<10} {', '.join(f'{value:.4f}' for value in told[name])} (of training pixels, 0 to 1)")
    if duplicates := told.get("duplicates"):
        print(f"copies     {duplicates['copies']:,}{', dropped' if duplicates.get('dropped') else ''}")
    print()
    rows = [(name, f"{s['samples']:,}", f"{s['shards']:,}", f"{s['unlabelled']:,}") for name, s in splits.items()]
    _table(("split", "images", "shards", "no label"), rows)
    if told["classes"]:
        print()
        counts = zip(*(split["per_class"] for split in splits.values()), strict=True)
        lines = [(printable(name), *map(plain, count)) for name, count in zip(told["classes"], counts, strict=True)]
        _table(("class", *splits), lines[:_CLASSES])
        _more(len(lines) - _CLASSES, "classes")
    _show_shuffle(told["shuffle"])


def _show_shuffle(told: Mapping[str, Any]) -> None:
    settings = f"window {told['window']}, seed {told['seed']}, batches of {told['batch']}"
    print(f"\nshuffle    {settings}; 1.0 is as good as a uniform shuffle")
    for name, text in _SHUFFLE.items():
        if name in told:
            print(f"  {name:<13} {told[name]['quality']:.2f}  {text.format(**told[name])}")
    if told["advice"]:
        print(f"  {told['advice']}")


def show_verification(result: Verification) -> None:
    """One line a finding; where there is none, how much was looked at."""
    for finding in result.findings[:_FINDINGS]:
        print(printable(finding))
    _more(len(result.findings) - _FINDINGS, "findings")
    if not result.findings:
        shards, images = counted(result.shards, "shard"), counted(result.images, "image")
        print(f"{result.place}: whole; {shards}, {images}, {result.bytes / 2**20:,.1f} MiB, {result.digest}")


def show_difference(told: Difference) -> None:
    """What tells dataset B from dataset A."""
    if told.same:
        print("the same dataset, by their cards: the same pixels and labels, in shards of the same sizes")
    for name, (one, other) in told.recipe.items():
        if name == "classes":
            alone = [[c for c in mine if c not in theirs] for mine, theirs in ((one, other), (other, one))]
            if any(alone):
                print(f"classes    only in A: {_names(alone[0])}; only in B: {_names(alone[1])}")
            else:
                print("classes    the same names in another order: their labels are other numbers to a model")
        else:
            print(f"{name:<10} A {_value(one)}, B {_value(other)}")
    if told.same:
        return
    _table(
        ("images", ""),
        [
            ("only in A", f"{told.only_a:,}"),
            ("only in B", f"{told.only_b:,}"),
            ("in both", f"{told.both:,}"),
            ("  of another split", f"{told.moved:,}"),
            ("    training in A, held out in B", f"{told.to_held_out:,}"),
            ("    held out in A, training in B", f"{told.to_train:,}"),
            ("  of another class", f"{told.relabelled:,}"),
            ("copies in A", f"{told.copies[0]:,}"),
            ("copies in B", f"{told.copies[1]:,}"),
        ],
    )
    if [row for row in told.classes if row["class"] is not None]:
        print()
        columns = ("a", "b", "only_a", "only_b")
        rows = [
            ("(no label)" if row["class"] is None else printable(row["class"]), *(f"{row[c]:,}" for c in columns))
            for row in told.classes
        ]
        _table(("class", "A", "B", "only in A", "only in B"), rows[:_CLASSES])
        _more(len(rows) - _CLASSES, "classes")


def _names(names: Sequence[str]) -> str:
    return (", ".join(map(printable, names[:_CLASSES])) + (", ..." if len(names) > _CLASSES else "")) or "none"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return " and ".join(f"{number:,} {name}" for name, number in value.items())
    return "says none" if value is None else printable(value)


def _more(number: int, what: str) -> None:
    if number > 0:
        print(f"... and {number:,} more {what}; --json has them all")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns under their names, the first to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
