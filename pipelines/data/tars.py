"""One shard that is open: its index in memory, and its tar at hand, be it a file, an object or a cached copy.

A member is read at the offset that the index gives, its sha256 is checked, and it is decoded; the tar itself is never
parsed.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pipelines.data.cache import ShardCache
from pipelines.data.decode import MAX_MEMBER_BYTES, Decode, Decoder
from pipelines.data.manifest import Split, read_index
from pipelines.data.order import Ints
from pipelines.data.sources.files import reason
from pipelines.files import RangeFile
from pipelines.s3 import insist, pauses_of
from pipelines.store import DamageError

_RUN_BYTES = 8 * 2**20
_Spans = dict[int, tuple[int, int]]  # offset and size of each member, by its place in what is asked for
_Take = Callable[[Iterable[tuple[int, bytes]]], dict[int, int]]
_COLUMNS = ("member", "offset", "size", "sha256", "label")


class Bad(NamedTuple):
    """What is wrong with a sample."""

    member: str
    """Empty where it is the whole shard that cannot be read."""
    reason: str


class OpenShard:
    """DamageError, naming the file, where the index is damaged or there is no tar; StorageError where storage fails.

    What lies on S3 is damaged, or missing, when it is so however patiently it is read again. Threads may share a shard.
    The tar is closed with the last reference: another thread may still be reading it.
    """

    def __init__(self, split: Split, number: int, decoder: Decoder, cache: ShardCache | None = None) -> None:
        self._shard = split.shard(number)
        self._tar = split.tars / self._shard.name
        self._decoder = decoder
        index = read_index(split, self._shard).select(_COLUMNS).combine_chunks()
        # Plain arrays: for each of many shards that are open, lists would hold an object for every field of a sample.
        self.labels: Ints = index["label"].to_numpy()
        self._offsets: Ints = index["offset"].to_numpy()
        self._sizes: Ints = index["size"].to_numpy()
        self._digests: bytes = b"".join(index["sha256"].to_pylist())
        can_be = (self._offsets >= 0) & (self._sizes > 0) & (self._sizes <= MAX_MEMBER_BYTES)
        self._is_there = can_be & (self._offsets <= self._shard.bytes - self._sizes)
        self._members = index["member"]
        self._decode: list[Decode | None] = [decoder.of(member) for member in self._members.to_pylist()]
        self._is_damaged = False
        self._cache = None if self._tar.is_local else cache
        cached = self._cache
        copy = insist(self._tar, lambda: cached.open(self._tar, self._shard)) if cached is not None else None
        self._file: RangeFile = copy or insist(self._tar, self._open_tar)

    def decode(self, rows: Sequence[int]) -> tuple[list[bytes | bytearray], dict[int, Bad]]:
        """Pixels of samples, H * W * C bytes each, and what is wrong with those that have none (b""), by place in
        `rows`. DamageError where the tar has gone meanwhile; StorageError where the storage fails; IndexError for a
        row that there is not."""
        found: list[bytes | bytearray] = [b""] * len(rows)
        bad: dict[int, Bad] = {}
        decoders, digests, sha256 = self._decode, self._digests, hashlib.sha256
        places = np.asarray(rows, dtype=np.int64)
        spans: _Spans = dict(enumerate(zip(self._offsets[places].tolist(), self._sizes[places].tolist(), strict=True)))
        for place in np.flatnonzero(~self._is_there[places]).tolist():
            bad[place] = self._bad(rows[place], _what_is_wrong(*spans.pop(place), 0))

        def take(members: Iterable[tuple[int, bytes]]) -> dict[int, int]:
            """Decode members; the sizes, by place, of those that are not what the index says."""
            wrong = {}
            for place, data in members:
                row = rows[place]
                if sha256(data).digest() != digests[32 * row : 32 * row + 32]:
                    wrong[place] = len(data)
                elif (decode := decoders[row]) is None:
                    bad[place] = self._bad(row, f"is not of a type that is read ({', '.join(self._decoder.types)})")
                else:
                    try:
                        found[place] = decode(data)
                    except Exception as error:  # Pillow's decoders raise nearly every kind
                        bad[place] = self._bad(row, f"cannot be decoded: {reason(error)}")
            return wrong

        wrong = take(self._read(spans))
        if wrong and not self._tar.is_local:
            wrong = self._read_again(spans, wrong, take)
        for place, size in wrong.items():
            bad[place] = self._bad(rows[place], _what_is_wrong(*spans[place], size))
        return found, bad

    def damage(self, bad: Bad) -> DamageError:
        """The error that names shard and member."""
        return DamageError(f"{self._tar}: member {bad.member} {bad.reason}")

    def _bad(self, row: int, reason: str) -> Bad:
        return Bad(self._members[row].as_py(), reason)

    def _open_tar(self) -> RangeFile:
        try:
            return self._tar.open()
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing() from None

    def _missing(self) -> DamageError:
        return DamageError(f"{self._tar} is missing")

    def _read(self, spans: _Spans) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of each member."""
        file, read_at = self._file, self._file.read_at
        if not file.gap:
            for place, (offset, size) in spans.items():
                yield place, read_at(offset, size)
            return
        runs: list[list[int]] = []  # members near each other come by one request
        begin = end = -1
        for place, (offset, size) in sorted(spans.items(), key=lambda item: item[1]):
            if runs and offset - end <= file.gap and offset + size - begin <= _RUN_BYTES:
                runs[-1].append(place)
                end = max(end, offset + size)
            else:
                runs.append([place])
                begin, end = offset, offset + size
        for run in runs:
            begin = spans[run[0]][0]
            size = max(sum(spans[place]) for place in run) - begin
            try:
                data = insist(self._tar, partial(read_at, begin, size))
            except FileNotFoundError:
                raise self._missing() from None
            for place in run:
                inside = spans[place][0] - begin
                yield place, data[inside : inside + spans[place][1]]

    def _read_again(self, spans: _Spans, wrong: dict[int, int], take: _Take) -> dict[int, int]:
        """Take members that are not what they should be from S3, again and again; those that stay so.

        A copy on this host may rot, or have made room, and an answer may be garbled on its way: none of it is damage of
        the dataset, which all hosts must see alike. Once something was damaged however long we waited, we wait no more.
        """
        if self._cache is not None and not self._file.gap:
            if any(size == spans[place][1] for place, size in wrong.items()):  # else it has made room
                self._cache.discard(self._shard)
            self._file = insist(self._tar, self._open_tar)
        for pause in itertools.chain([0.0], pauses_of(self._tar)):
            if not self._is_damaged:
                time.sleep(pause)
                self._file = insist(self._tar, self._open_tar)  # its size may have been told wrongly too
            wrong = take(self._read({place: spans[place] for place in wrong}))
            if not wrong:
                return wrong
        self._is_damaged = True
        return wrong


def _what_is_wrong(offset: int, size: int, found: int) -> str:
    if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
        return f"cannot be {size} bytes at {offset}, as the index has it"
    if found < size:
        return "is cut short: the file ends before it"
    return "does not match the sha256 in the index"
