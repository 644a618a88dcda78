"""Reads samples of a split by (shard, row), and streams a worker's slots, decoded ahead.

Of a shard on this host each sample is read by `pread`; of one on S3 by ranges, or from a whole copy on local disk where
there is a `ShardCache`. Its sha256 is checked at each read. A split whose decoded pixels fit into memory (256 MiB
unless told) is kept decoded: each sample is read, checked and decoded once.
"""

import contextlib
import math
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np

from pipelines.data.cache import ShardCache
from pipelines.data.damage import Damage, Sample, Substitutes
from pipelines.data.decode import MAX_MEMBER_BYTES, Decoder, Pixels
from pipelines.data.manifest import Split
from pipelines.data.order import Ints, Order, slot_positions
from pipelines.data.tars import Bad, OpenShard
from pipelines.store import DamageError

__all__ = ["MAX_MEMBER_BYTES", "Damage", "Pixels", "Reader", "ShardCache", "Slot", "SlotStream"]

Slot = tuple[int, int, Pixels, Ints]
"""(step, slot, images [b, H, W, C], labels [b])."""

CACHE_BYTES = 256 * 2**20
SHARDS_OPEN = 64
AHEAD_BYTES = 64 * 2**20
_REMOTE_THREADS = 8  # they mostly wait
_LOCAL_THREADS = 2
_SMALL_IMAGE = 2048  # bytes; decoding less is so much Python that a second thread costs more than it gives
_MOST_SLOTS_AHEAD = 256  # of small images a store of bytes would hold minutes of work, done at once at the start
_RUN_BYTES = 2**20  # small slots are read several at once, for much of what reading one costs is what any read costs
_FAREWELL_SECONDS = 1.0
_SPARE_FILES = 128  # for whatever else a process opens


class Reader:
    """Random access to the samples of a split. Threads may share one; processes open their own."""

    def __init__(
        self,
        split: Split,
        cache_bytes: int = CACHE_BYTES,
        *,
        shard_cache: ShardCache | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        on_damage: Callable[[Damage], None] | None = None,
        shards_open: int = SHARDS_OPEN,
    ) -> None:
        """`cache_bytes` is for decoded pixels in memory, `shard_cache` for tars on local disk.

        With `on_error="skip"` the sample that `Substitutes` names is read instead of a damaged one, and `on_damage` is
        told once. Up to `shards_open` shards stay open, fewer where the process may not have as many files: an order's
        window, better two, should be among them.
        """
        self.split = split
        self.shape = (split.image_size, split.image_size, split.channels)
        """[H, W, C] of an image."""
        self._decoder = Decoder(self.shape, split.fit)
        self._shard_cache, self._shards_open = shard_cache, min(shards_open, len(split.table))
        if split.tars.is_local or shard_cache is not None:  # others have no files
            self._shards_open = _affordable(self._shards_open)
        self._open: OrderedDict[int, _Opening] = OrderedDict()
        self._lock = threading.Lock()
        fits = len(split) * int(np.prod(self.shape)) <= cache_bytes
        self._decoded: dict[int, _Decoded] | None = {} if fits else None
        self._lost: dict[int, str] = {}
        self._substitutes: Substitutes | None = None
        if on_error == "skip":
            shards = list(zip(split.table["name"].to_pylist(), split.shard_sizes, strict=True))
            self._substitutes = Substitutes(split.name, shards, self._read_one, on_damage)

    @property
    def threads(self) -> int:
        """How many threads may well read ahead."""
        if not self.split.tars.is_local and self._shard_cache is None:
            return _REMOTE_THREADS
        small = self._decoded is not None or int(np.prod(self.shape)) < _SMALL_IMAGE
        return 1 if small else _LOCAL_THREADS

    def read(self, shards: Ints, rows: Ints) -> tuple[Pixels, Ints]:
        """Images uint8 [n, H, W, C] and labels int64 [n] (-1 for none) at (shard, row) pairs.

        DamageError names shard and member where the stored bytes are not what was ingested; StorageError the file
        that cannot be had at all.
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
        sizes = np.asarray(self.split.shard_sizes, dtype=np.int64)
        rows = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.read(np.repeat(np.arange(len(sizes)), sizes), rows)

    def _read_shard(self, number: int, rows: Ints) -> tuple[Pixels, Ints]:
        if self._decoded is None:
            return self._decode(number, rows)
        if number not in self._decoded:
            self._decoded.setdefault(number, _Decoded(self.split.shard_sizes[number], self.shape))
        decoded = self._decoded[number]
        absent = rows[~decoded.present[rows]]
        if len(absent):
            decoded.images[absent], decoded.labels[absent] = self._decode(number, absent)
            decoded.present[absent] = True  # after the pixels: another thread may look
        return decoded.images[rows], decoded.labels[rows]

    def _decode(self, number: int, rows: Ints) -> tuple[Pixels, Ints]:
        wanted = rows.tolist()
        found, labels, bad = self._take(number, wanted)
        for place in bad:
            assert self._substitutes is not None
            found[place], labels[place] = self._substitutes.of(number, wanted[place], bad[place])
        return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(wanted), *self.shape), labels

    def _with_advice(self, error: DamageError) -> DamageError:
        verify = f"ddpm data verify {self.split.place}"
        return DamageError(f"{error}; `{verify}` names all damage, data.on_error: skip trains without it")

    def _read_one(self, number: int, row: int) -> Sample | Bad:
        found, labels, bad = self._take(number, [row])
        return bad[0] if bad else (found[0], int(labels[0]))

    def _take(self, number: int, rows: list[int]) -> tuple[list[bytes | bytearray], Ints, dict[int, Bad]]:
        """Pixels and labels of a shard's samples, and what is wrong with those that have none, by place in `rows`;
        DamageError for the first of these, unless they are substituted."""
        try:
            shard = self._shard(number)
            found, bad = shard.decode(rows)
        except DamageError as error:
            if self._substitutes is None:
                raise self._with_advice(error) from None
            self._lost[number] = str(error)
            bad = dict.fromkeys(range(len(rows)), Bad("", str(error)))
            return [b""] * len(rows), np.empty(len(rows), dtype=np.int64), bad
        if bad and self._substitutes is None:
            raise self._with_advice(shard.damage(bad[min(bad)]))
        return found, shard.labels[rows], bad

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            opening = self._open.setdefault(number, _Opening())
            self._open.move_to_end(number)
            while len(self._open) > self._shards_open:
                self._open.popitem(last=False)
        with opening.lock:  # one thread opens it, which may take a download; those that want it too wait
            if number in self._lost:
                raise DamageError(self._lost[number])
            if opening.shard is None:
                try:
                    opening.shard = OpenShard(self.split, number, self._decoder, self._shard_cache)
                except DamageError as error:  # those that wait need not find out anew
                    if self._substitutes is not None:
                        self._lost[number] = str(error)
                    raise
            return opening.shard


def _affordable(files: int) -> int:
    """How many of so many files this process may have open; its own limit is raised as far as it takes and may be."""
    taken = len(os.listdir("/dev/fd")) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or taken + files <= soft:
        return files
    limit = taken + files if hard == resource.RLIM_INFINITY else min(taken + files, hard)
    with contextlib.suppress(OSError, ValueError):  # the system may have a limit below the one that it names
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, soft), hard))
    return max(1, min(files, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - taken))


class _Opening:
    """A shard that is open, or that a thread is opening."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shard: OpenShard | None = None


class _Decoded:
    """Decoded images of a shard, filled in as they are asked for."""

    def __init__(self, samples: int, shape: tuple[int, int, int]) -> None:
        self.images = np.empty((samples, *shape), dtype=np.uint8)
        self.labels = np.empty(samples, dtype=np.int64)
        self.present = np.zeros(samples, dtype=bool)


class SlotStream:
    """Stream of the slots that a worker owns, read and decoded ahead by a few threads.

    Yields (step, slot, images uint8 [b, H, W, C], labels int64 [b]) for every owned slot of every step from
    `start_step` on, in that order, with b = global_batch / slots; up to `end_step`, beyond which nothing is read, or
    for ever. Slots that are decoded or being decoded ahead take at most `ahead_bytes`, or are one. A worker that owns
    no slot gets an empty stream. An error of a thread is raised where the stream is read, in the place of the slot that
    it belongs to.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        global_batch: int,
        slots: int,
        owned: Sequence[int],
        start_step: int,
        ahead_bytes: int = AHEAD_BYTES,
        threads: int | None = None,
        end_step: int | None = None,
    ) -> None:
        """`threads` is by default what suits the reader."""
        threads = threads or reader.threads
        self._reader, self._order = reader, order
        self._global_batch, self._slots, self._owned = global_batch, slots, tuple(owned)
        self._start_step = start_step
        self._count = math.inf if end_step is None else max(0, end_step - start_step) * len(self._owned)
        slot_bytes = global_batch // slots * int(np.prod(reader.shape))
        self._room = max(1, min(ahead_bytes // slot_bytes, _MOST_SLOTS_AHEAD))
        self._run = max(1, min(_RUN_BYTES // slot_bytes, self._room // (2 * threads)))
        self._changed = threading.Condition()
        self._ready: dict[int, Slot | BaseException] = {}
        self._begun = self._delivered = 0
        self._closed = not self._owned
        # Daemons: a training loop that dies without closing must not keep its process alive.
        names = [f"slots-{number}" for number in range(min(threads, self._room))] if self._owned else []
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Slot]:
        return self

    def __next__(self) -> Slot:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._delivered in self._ready or self._delivered == self._count
            )
            if self._closed or self._delivered == self._count:
                raise StopIteration
            item = self._ready.pop(self._delivered)
            self._delivered += 1
            if self._has_room():
                self._changed.notify_all()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the threads; the stream ends here. One that waits for the storage is left to end by itself."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        end = time.monotonic() + _FAREWELL_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has_room(self) -> bool:
        return self._begun + self._run <= self._delivered + self._room

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._begun == self._count or self._has_room())
                if self._closed or self._begun == self._count:
                    return
                first, self._begun = self._begun, int(min(self._begun + self._run, self._count))
                numbers = range(first, self._begun)
            try:
                items: Sequence[Slot | BaseException] = self._read(numbers)
            except BaseException as error:  # carried to the reader of the stream, whatever it is
                items = [error]
            with self._changed:
                if not self._closed:
                    self._ready.update(enumerate(items, first))
                    self._changed.notify_all()

    def _read(self, numbers: range) -> list[Slot | BaseException]:
        """The stream's slots of these numbers, counted from 0; up to the first that cannot be had, and its error."""
        places = [(self._start_step + n // len(self._owned), self._owned[n % len(self._owned)]) for n in numbers]
        positions = [slot_positions(*place, self._slots, self._global_batch) for place in places]
        try:
            images, labels = self._reader.read(*self._order.locate(np.concatenate(positions)))
        except Exception as error:
            if len(numbers) == 1:
                return [error]
            found: list[Slot | BaseException] = []
            for number in numbers:  # which of them is it?
                found += self._read(range(number, number + 1))
                if isinstance(found[-1], BaseException):
                    break
            return found
        many, count = len(numbers), self._global_batch // self._slots
        parts = zip(images.reshape(many, count, *self._reader.shape), labels.reshape(many, count), strict=True)
        return [(*place, *part) for place, part in zip(places, parts, strict=True)]
