"""Reads samples of a split by (shard, row), and streams a worker's slots, decoded ahead.

A sample is read by `pread` at the offset that the shard's index gives, its sha256 is checked, and a PNG of exactly
the dataset's size is decoded; no tar is parsed, nothing is unpickled or executed. A split whose decoded pixels fit
into the cache (256 MiB unless told) is kept decoded: each sample is read, checked and decoded once.
"""

import hashlib
import io
import os
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.manifest import Split, read_index
from pipelines.data.order import Ints, Order, slot_positions
from pipelines.store import DamageError

Pixels = NDArray[np.uint8]
Slot = tuple[int, int, Pixels, Ints]
"""(step, slot, images [b, H, W, C], labels [b])."""

CACHE_BYTES = 256 * 2**20
MAX_MEMBER_BYTES = 64 * 2**20
_MEMBER_TYPES = (".png",)
_SHARDS_OPEN = 64


class Reader:
    """Random access to the samples of a split. Threads may share one; processes open their own."""

    def __init__(self, split: Split, cache_bytes: int = CACHE_BYTES) -> None:
        self.split = split
        self.shape = (split.image_size, split.image_size, split.channels)
        """[H, W, C] of an image."""
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        fits = len(split) * int(np.prod(self.shape)) <= cache_bytes
        self._decoded: dict[int, _Decoded] | None = {} if fits else None

    def read(self, shards: Ints, rows: Ints) -> tuple[Pixels, Ints]:
        """Images uint8 [n, H, W, C] and labels int64 [n] (-1 for none) at (shard, row) pairs.

        DamageError names shard and member where the stored bytes are not what was ingested.
        """
        shards, rows = np.asarray(shards, dtype=np.int64), np.asarray(rows, dtype=np.int64)
        images = np.empty((len(rows), *self.shape), dtype=np.uint8)
        labels = np.empty(len(rows), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            images[here], labels[here] = self._read_shard(shard, rows[here])
        return images, labels

    def read_all(self) -> tuple[Pixels, Ints]:
        """Every image and label, in the order of shards and rows."""
        sizes = self.split.shard_sizes
        shards = np.repeat(np.arange(len(sizes)), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        return self.read(shards, rows)

    def _read_shard(self, number: int, rows: Ints) -> tuple[Pixels, Ints]:
        shard = self._shard(number)
        if self._decoded is None:
            return np.stack([shard.decode(row, self.shape) for row in rows.tolist()]), shard.labels[rows]
        if number not in self._decoded:
            self._decoded.setdefault(number, _Decoded(len(shard.labels), self.shape))
        decoded = self._decoded[number]
        for row in rows[~decoded.present[rows]].tolist():
            decoded.images[row] = shard.decode(row, self.shape)
            decoded.present[row] = True  # after the pixels: another thread may look
        return decoded.images[rows], shard.labels[rows]

    def _shard(self, number: int) -> "_OpenShard":
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        opened = _OpenShard(self.split, number)
        with self._lock:
            self._open[number] = opened
            while len(self._open) > _SHARDS_OPEN:
                self._open.popitem(last=False)
        return opened


class SlotStream:
    """Endless stream of the slots that a worker owns, read and decoded ahead by one thread.

    Yields (step, slot, images uint8 [b, H, W, C], labels int64 [b]) for every owned slot of every step from
    `start_step` on, with b = global_batch / slots and up to `ahead` steps decoded in advance. A worker that owns
    no slot gets an empty stream. An error of the thread is raised where the stream is read.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        global_batch: int,
        slots: int,
        owned: Sequence[int],
        start_step: int,
        ahead: int = 2,
    ) -> None:
        self._reader, self._order = reader, order
        self._global_batch, self._slots, self._owned = global_batch, slots, tuple(owned)
        self._ready: queue.SimpleQueue[Slot | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(max(1, ahead * len(self._owned)))
        self._closed = threading.Event()
        # A daemon: a training loop that dies without closing must not keep its process alive.
        self._thread = threading.Thread(target=self._fill, args=(start_step,), name="slots", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Slot]:
        return self

    def __next__(self) -> Slot:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is None:
                raise StopIteration
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """Stop the thread; the stream ends here."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, step: int) -> None:
        try:
            while self._owned and not self._closed.is_set():
                for slot in self._owned:
                    self._room.acquire()
                    if self._closed.is_set():
                        break
                    positions = slot_positions(step, slot, self._slots, self._global_batch)
                    images, labels = self._reader.read(*self._order.locate(positions))
                    self._ready.put((step, slot, images, labels))
                step += 1
            self._ready.put(None)
        except BaseException as error:  # carried to the reader of the stream, whatever it is
            self._ready.put(error)


class _Decoded:
    """Decoded images of a shard, filled in as they are asked for."""

    def __init__(self, samples: int, shape: tuple[int, int, int]) -> None:
        self.images = np.empty((samples, *shape), dtype=np.uint8)
        self.present = np.zeros(samples, dtype=bool)


class _OpenShard:
    """A shard's index in memory and its tar open for reading."""

    def __init__(self, split: Split, number: int) -> None:
        shard = split.shard(number)
        index = read_index(split, shard)
        self.tar = split.place / shard.name
        self.labels: Ints = index["label"].to_numpy()
        self._members: list[str] = index["member"].to_pylist()
        self._offsets: list[int] = index["offset"].to_pylist()
        self._sizes: list[int] = index["size"].to_pylist()
        self._sha256: list[bytes] = index["sha256"].to_pylist()
        try:
            self._file = os.open(self.tar.path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamageError(f"{self.tar} is missing") from None
        # Closed with the last reference: another thread may be reading a shard that has left the list.
        weakref.finalize(self, os.close, self._file)

    def decode(self, row: int, shape: tuple[int, int, int]) -> Pixels:
        """Pixels [H, W, C] of one sample, its bytes checked first."""
        offset, size = self._offsets[row], self._sizes[row]
        if not self._members[row].endswith(_MEMBER_TYPES):
            raise self._damage(row, f"is not of a type that is read ({', '.join(_MEMBER_TYPES)})")
        if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
            raise self._damage(row, f"cannot be {size} bytes at {offset}, as the index has it")
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise self._damage(row, "is cut short: the file ends before it")
        if hashlib.sha256(data).digest() != self._sha256[row]:
            raise self._damage(row, "does not match the sha256 in the index")
        try:
            pixels = _decode_png(data, shape)
        except Exception as error:  # Pillow's decoders raise nearly every kind
            raise self._damage(row, f"cannot be decoded: {error}") from None
        return pixels

    def _damage(self, row: int, what: str) -> DamageError:
        return DamageError(f"{self.tar}: member {self._members[row]} {what}")


def _decode_png(data: bytes, shape: tuple[int, int, int]) -> Pixels:
    height, width, channels = shape
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        # The header is compared before any pixel is decoded, so a picture that claims to be huge costs nothing.
        if image.size != (width, height) or image.mode != ("L" if channels == 1 else "RGB"):
            raise ValueError(f"it is {image.mode} {image.width} x {image.height}, the dataset {shape}")
        return np.asarray(image).reshape(shape)
