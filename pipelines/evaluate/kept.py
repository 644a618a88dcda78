"""What was worked out once is kept: read where it lies whole, else worked out, again where it was damaged.

A kept file is the sha256 of what it holds, and that: of features whose bits were changed nothing else would tell.
"""

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.cluster import Cluster
from pipelines.data.work import over_chunks
from pipelines.store import DamageError, Place

T = TypeVar("T")
Chunk = TypeVar("Chunk")
Arrays = Mapping[str, NDArray[Any]]

_DIGEST = hashlib.sha256().digest_size


def kept(place: Place, make: Callable[[], T], save: Callable[[T], bytes], load: Callable[[bytes], T]) -> T:
    """What lies in a file, or is made and put there. `load` is the inverse of `save`, with DamageError for what is none
    of this version's. Whoever else makes it at the same time makes the same."""
    if (there := found(place, load)) is not None:
        return there
    made = make()
    data = save(made)
    place.write(hashlib.sha256(data).digest() + data)
    return made


def found(place: Place, load: Callable[[bytes], T]) -> T | None:
    """What lies in a file that `kept` wrote; None where there is none or, with a warning, where it is damaged."""
    try:
        return load(_opened(place.read()))
    except FileNotFoundError:
        return None
    except DamageError as error:
        warnings.warn(f"{place}: {error}, and made again", stacklevel=3)
        return None


def kept_arrays(place: Place, make: Callable[[], Arrays]) -> Arrays:
    """Arrays by name, kept."""
    return kept(place, make, _save_arrays, load_arrays)


def kept_json(place: Place, make: Callable[[], Any]) -> Any:
    """A plain value, kept."""
    return kept(place, make, lambda value: json.dumps(value).encode(), json.loads)


def over_kept(
    work: Callable[[Chunk], T], chunks: Sequence[Chunk], cluster: Cluster, workers: int | None = None
) -> Iterator[tuple[int, T]]:
    """`over_chunks` with work that keeps what it makes: of damage that another process meets the user is told too."""
    for place, (result, lines) in over_chunks(Telling(work), chunks, cluster, workers):
        repeat(lines)
        yield place, result


@dataclass(frozen=True)
class Telling(Generic[Chunk, T]):
    """Work, with its warnings: a process of Ray's has nobody to say them to."""

    work: Callable[[Chunk], T]

    def __call__(self, chunk: Chunk) -> tuple[T, list[str]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            result = self.work(chunk)
        return result, [str(one.message) for one in said if issubclass(one.category, UserWarning)]


def repeat(lines: Sequence[str]) -> None:
    """Warn of what another process was warned of."""
    for line in lines:
        warnings.warn(line, stacklevel=3)


def _opened(data: bytes) -> bytes:
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise DamageError("is damaged")
    return content


def _save_arrays(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def load_arrays(data: bytes) -> Arrays:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
