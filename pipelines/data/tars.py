"""One shard that is open: its index in memory, and its tar at hand, be it a file, an object or a cached copy.

A member is read at the offset that the index gives, its sha256 is checked, and it is decoded; the tar itself is never
parsed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.data.cache import ShardCache
from pipelines.data.decode import MAX_MEMBER_BYTES, Decode, Decoder
from pipelines.data.manifest import Split, read_index
from pipelines.data.order import Ints
from pipelines.data.sources.files import reason
from pipelines.store import DamageError, RangeFile

_RUN_BYTES = 8 * 2**20
_COLUMNS = ("member", "offset", "size", "sha256", "label")


class Bad(NamedTuple):
    """What is wrong with a sample."""

    member: str
    """Empty where it is the whole shard that cannot be read."""
    reason: str


class OpenShard:
    """DamageError, naming the file, where the index is damaged or there is no tar; StorageError where storage fails.

    Threads may share one. The tar is closed with the last reference: another thread may still be reading it.
    """

    def __init__(self, split: Split, number: int, decoder: Decoder, cache: ShardCache | None = None) -> None:
        self._shard = split.shard(number)
        self._tar = split.tars / self._shard.name
        self._decoder, self._cache = decoder, cache
        index = read_index(split, self._shard).select(_COLUMNS).combine_chunks()
        # Plain arrays: for each of many shards that are open, lists would hold an object for every field of a sample.
        self.labels: Ints = index["label"].to_numpy()
        self._offsets: Ints = index["offset"].to_numpy()
        self._sizes: Ints = index["size"].to_numpy()
        self._digests: bytes = b"".join(index["sha256"].to_pylist())
        self._members = index["member"]
        self._decode: list[Decode | None] = [decoder.of(member) for member in self._members.to_pylist()]
        self._copy = cache.open(self._tar, self._shard) if cache is not None and not self._tar.is_local else None
        try:
            self._file: RangeFile = self._copy or self._tar.open()
        except (FileNotFoundError, NotADirectoryError):
            raise DamageError(f"{self._tar} is missing") from None

    def decode(self, rows: Sequence[int]) -> tuple[list[bytes | bytearray], dict[int, Bad]]:
        """Pixels of samples, H * W * C bytes each, and what is wrong with those that have none (b""), by place in
        `rows`. StorageError where the storage fails; IndexError for a row that there is not."""
        found: list[bytes | bytearray] = [b""] * len(rows)
        bad: dict[int, Bad] = {}
        decoders, digests, sha256 = self._decode, self._digests, hashlib.sha256
        places = np.asarray(rows, dtype=np.int64)
        offsets, sizes = self._offsets[places].tolist(), self._sizes[places].tolist()
        for place, data in self._read(offsets, sizes):
            row = rows[place]
            decode = decoders[row]
            digest = digests[32 * row : 32 * row + 32]
            if decode is None:
                bad[place] = self._bad(row, f"is not of a type that is read ({', '.join(self._decoder.types)})")
                continue
            if sha256(data).digest() != digest:
                again = self._read_again(offsets[place], sizes[place])
                if again is None or sha256(again).digest() != digest:
                    bad[place] = self._bad(row, _what_is_wrong(offsets[place], sizes[place], len(data)))
                    continue
                data = again
            try:
                found[place] = decode(data)
            except Exception as error:  # Pillow's decoders raise nearly every kind
                bad[place] = self._bad(row, f"cannot be decoded: {reason(error)}")
        return found, bad

    def damage(self, bad: Bad) -> DamageError:
        """The error that names shard and member."""
        return DamageError(f"{self._tar}: member {bad.member} {bad.reason}")

    def _bad(self, row: int, reason: str) -> Bad:
        return Bad(self._members[row].as_py(), reason)

    def _read(self, offsets: list[int], sizes: list[int]) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of each member; none of them for one that cannot be where the index has it."""
        read_at, gap = self._file.read_at, self._file.gap
        if not gap:
            for place, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                yield place, read_at(offset, size) if offset >= 0 and 0 < size <= MAX_MEMBER_BYTES else b""
            return
        runs: list[list[int]] = []  # members near each other come by one request
        begin = end = -1
        for place in sorted(range(len(offsets)), key=offsets.__getitem__):
            offset, size = offsets[place], sizes[place]
            if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
                yield place, b""
            elif runs and offset - end <= gap and offset + size - begin <= _RUN_BYTES:
                runs[-1].append(place)
                end = max(end, offset + size)
            else:
                runs.append([place])
                begin, end = offset, offset + size
        for run in runs:
            begin = offsets[run[0]]
            data = read_at(begin, max(offsets[place] + sizes[place] for place in run) - begin)
            for place in run:
                inside = offsets[place] - begin
                yield place, data[inside : inside + sizes[place]]

    def _read_again(self, offset: int, size: int) -> bytes | None:
        """A member that is not what it should be, from where it comes from; None where that is where it was read.

        A copy on this host may rot and an answer may be garbled on its way: neither is damage of the dataset, which
        all hosts must see alike.
        """
        if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
            return None
        if self._copy is not None and self._file is self._copy:
            assert self._cache is not None
            self._cache.discard(self._shard)
            try:
                self._file = self._tar.open()
            except FileNotFoundError:
                return None
        elif self._tar.is_local:
            return None
        return self._file.read_at(offset, size)


def _what_is_wrong(offset: int, size: int, found: int) -> str:
    if offset < 0 or not 0 < size <= MAX_MEMBER_BYTES:
        return f"cannot be {size} bytes at {offset}, as the index has it"
    if found < size:
        return "is cut short: the file ends before it"
    return "does not match the sha256 in the index"
