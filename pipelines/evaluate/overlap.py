"""Whether a model was trained on images that it is scored against."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute

from pipelines.data.manifest import CARD, Dataset, Split, read_index
from pipelines.errors import UserError
from pipelines.evaluate.kept import kept_json
from pipelines.evaluate.sets import HELD_OUT
from pipelines.files import StorageError
from pipelines.models import Model
from pipelines.store import DamageError, Place, identity

SEEN = "held_out_seen"
"""Held-out images that a model was trained on: in the provenance of its scores, and in the evidence."""


def held_out_seen(model: Model, dataset: Dataset, store: Place) -> int | None:
    """How many held-out images of a dataset are, pixel by pixel, among those that a model was trained on; None where
    these are not to be found.

    Of its own dataset none is, as its card says, unless a source's own split has images in both: then, and for another
    dataset, the contents in the shards' indices are compared.
    """
    own = model.dataset_digest == dataset.digest
    if own and _splits_are_apart(dataset):
        return 0
    known = {"trained_on": model.dataset_digest, "held_out_of": dataset.digest}
    try:
        trained = dataset if own else trained_on(model, store)
        return int(kept_json(store / "overlaps" / f"{identity(known)[:16]}.json", lambda: _common(dataset, trained)))
    except (UserError, DamageError, StorageError):
        return None


def trained_on(model: Model, store: Place) -> Dataset:
    """The dataset that a model was trained on, in the store or where its spec names one. UserError where it is gone."""
    datasets, source = store / "datasets", model.spec.data.source
    places = [datasets / name for name in datasets.list()]
    for place in places if source == "digits" else [*places, Place.of(source)]:
        if (place / CARD).exists() and (found := _opened(place)) and found.digest == model.dataset_digest:
            return found
    raise UserError(f"{model.origin}: the data that it was trained on is not in {store}; name a dataset by --against")


def _opened(place: Place) -> Dataset | None:
    """A dataset; None of one that is damaged, or another version's: it is not the one."""
    try:
        return Dataset.open(place)
    except (UserError, DamageError):
        return None


def _splits_are_apart(dataset: Dataset) -> bool:
    found = dataset.card.get("duplicates") or {}
    return bool(found.get("dropped")) or found.get("between_splits") == 0


def _common(dataset: Dataset, trained: Dataset) -> int:
    """Held-out images of one dataset with the content of a training image of another."""
    held_out = pa.chunked_array(list(_contents(dataset.split(HELD_OUT))), pa.binary(32))
    both = {
        content
        for contents in _contents(trained.split("train"))
        for content in contents.filter(pa.compute.is_in(contents, held_out)).to_pylist()
    }
    return sum(content in both for content in held_out.to_pylist())


def _contents(split: Split) -> Iterator[pa.Array]:
    """Digests of the images' pixels, by the shard."""
    for shard in split.shards:
        yield read_index(split, shard)["content"].combine_chunks()
