"""What makes shards a dataset: the contact sheet, the table of shards, the page for people and, last, the card."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.manifest import (
    CARD,
    CARD_PAGE,
    FORMAT,
    SHARD_COLUMNS,
    SHARDS,
    SHEET,
    SPLITS,
    Dataset,
    Split,
    read_table,
    write_table,
)
from pipelines.data.recipe import Recipe
from pipelines.data.shards import encode_png
from pipelines.data.sources import NO_LABEL
from pipelines.data.write import ShardRecord
from pipelines.store import Place, sha256

_SHEET_SIDE = 10
SHEET_IMAGES = _SHEET_SIDE**2
"""Most images of a contact sheet."""
_SHEET_CELLS = (48, 128)
"""Small images are enlarged (by whole numbers) towards the first, large ones shrunk to the second, pixels."""


def commit(
    out: Place,
    records: Sequence[ShardRecord],
    recipe: Recipe,
    *,
    digest: str,
    classes: Sequence[str],
    source: Mapping[str, str],
    found: Mapping[str, Any],
    sheet: bytes | Callable[[Split], bytes],
    decode: Literal["exact", "fit"] = "exact",
    tars: str | None = None,
) -> Dataset:
    """Write the files that make shards a dataset, the card last, and open it. `found`: more for the card to tell.

    The contact sheet may be drawn of the training split as it will be.
    """
    columns = {name: [_cell(record, name) for record in records] for name in SHARD_COLUMNS}
    table = write_table(SHARD_COLUMNS, columns)
    mean, deviation = _moments([record for record in records if record.split == SPLITS[0]], recipe)
    card = {
        "format": FORMAT,
        "digest": digest,
        **recipe.fields(),
        "classes": list(classes),
        "splits": {split: _counts([r for r in records if r.split == split], len(classes)) for split in SPLITS},
        "mean": mean,
        "std": deviation,
        "source": dict(source),
        **found,
        "decode": decode,
        "tars": tars,
        "sheet": SHEET,
        "shards_sha256": sha256(table),
    }
    if callable(sheet):
        dataset = Dataset(out, card, read_table(table, SHARD_COLUMNS, out / SHARDS))
        sheet = sheet(dataset.split(SPLITS[0]))
    (out / SHEET).write(sheet)
    (out / SHARDS).write(table)
    (out / CARD_PAGE).write(page(card).encode())
    (out / CARD).write_json(card)
    return Dataset.open(out)


def contact_sheet(count: int, load: Callable[[int], NDArray[np.uint8]]) -> bytes:
    """PNG of up to 100 of `count` images (`load(i)` -> pixels [S, S, C]), evenly spaced through them."""
    shown = min(count, SHEET_IMAGES)
    return sheet_of([load(place * count // shown) for place in range(shown)])


def sheet_of(images: Sequence[NDArray[np.uint8]]) -> bytes:
    """PNG of images [S, S, C] in rows of ten, large enough to be seen."""
    size, small, large = images[0].shape[0], *_SHEET_CELLS
    cell = min(large, size * max(1, small // size))
    method = Image.Resampling.NEAREST if cell >= size else Image.Resampling.BOX
    columns = min(len(images), _SHEET_SIDE)
    sheet = Image.new("RGB", (columns * (cell + 2) + 2, -(-len(images) // columns) * (cell + 2) + 2), "white")
    for place, pixels in enumerate(images):
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).resize((cell, cell), method)
        sheet.paste(picture, (2 + place % columns * (cell + 2), 2 + place // columns * (cell + 2)))
    return encode_png(np.asarray(sheet))


def page(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    side, kind = card["image_size"], {1: "grey", 3: "RGB"}[card["channels"]]
    splits = {name: card["splits"][name] for name in SPLITS}  # a card that was read has them sorted
    lines = [
        f"# {card['source']['name'].rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"{sum(split['samples'] for split in splits.values()):,} images, {side} x {side} {kind}, made of "
        f"{card['source']['kind']} `{card['source']['name']}`. Digest `{card['digest']}`.",
        "",
        f"![a contact sheet of training images]({card['sheet']})",
        "",
        "| split | images | shards | without a label |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {s['samples']:,} | {s['shards']:,} | {s['unlabelled']:,} |" for name, s in splits.items()),
    ]
    if card["classes"]:
        lines += ["", f"| class | {' | '.join(splits)} |", "|---|" + "---:|" * len(splits)]
        for label, name in enumerate(card["classes"]):
            counts = " | ".join(f"{split['per_class'][label]:,}" for split in splits.values())
            lines.append(f"| {name.replace('|', chr(92) + '|')} | {counts} |")
    numbers = [", ".join(f"{value:.4f}" for value in card[name]) for name in ("mean", "std")]
    lines += ["", f"Mean {numbers[0]} and standard deviation {numbers[1]} of the training pixels, of 0 to 1."]
    if sizes := card.get("source_sizes"):
        words = ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes.items())
        lines.append(f"Sizes in the source: {words}.")
    if (duplicates := card.get("duplicates")) and duplicates["copies"]:
        done = "were dropped" if duplicates["dropped"] else "are exact copies of others"
        lines.append(f"{duplicates['copies']:,} images {done}.")
    return "\n".join(lines) + "\n"


def _cell(record: ShardRecord, column: str) -> Any:
    """Digests are hex in a record, which is kept as JSON, and bytes in the table."""
    value = getattr(record, column)
    return bytes.fromhex(value) if column in ("sha256", "index_sha256") else value


def _counts(records: Sequence[ShardRecord], classes: int) -> dict[str, Any]:
    labels = Counter[int]()
    for record in records:
        labels.update(record.labels)
    return {
        "samples": sum(record.samples for record in records),
        "shards": len(records),
        "per_class": [labels[label] for label in range(classes)],
        "unlabelled": labels[NO_LABEL],
    }


def _moments(records: Sequence[ShardRecord], recipe: Recipe) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]."""
    count = sum(record.samples for record in records) * recipe.image_size**2
    means, deviations = [], []
    for channel in range(recipe.channels):
        total = sum(record.pixel_sum[channel] for record in records)
        squares = sum(record.pixel_square_sum[channel] for record in records)
        means.append(total / count / 255)
        deviations.append((count * squares - total * total) ** 0.5 / count / 255)
    return means, deviations
