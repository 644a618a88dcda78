"""A lock on S3: a lease. Its holder renews it; one that is not renewed for so long is taken by the next who asks.

The object says who holds it and is written anew, with a rising number, at every renewal. That it does not change any
more is seen on one's own clock, and where the server tells the time also by its clock, so that the lease of a holder
who died yesterday is not waited for. Every write is conditional on what was read before: of two who take it, one does.

A holder who was cut off for longer than the lease finds it taken when it comes back, and must stop. Until it has, two
may be at work: what they write must bear that, as a run does by the numbers of its attempts.
"""

import contextlib
import json
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import Failed, UserError, one_line
from pipelines.files import StorageError
from pipelines.locks import held_by, this_process
from pipelines.s3_conditional import Seen

if TYPE_CHECKING:
    from pipelines.s3 import S3Place

FORMAT = 1


@dataclass(frozen=True)
class Terms:
    """Of a lease, the same for all who may ask for it; seconds."""

    lease: float = 30.0
    """Without a renewal; then it is free."""
    renew: float = 8.0
    look: float = 1.0
    """Between two looks of who waits for it."""
    join: float = 5.0
    """For which the end waits for a renewal under way."""


class Lease:
    """One holder's, or would-be holder's. `place` is for who waits, and tries a request as often as any; `brisk` for
    renewals, which come again anyway."""

    def __init__(self, place: "S3Place", brisk: "S3Place", what: str, terms: Terms) -> None:
        self._place, self._brisk, self._what, self._terms = place, brisk, what, terms
        self._token, self._holder, self._number, self._tag = uuid.uuid4().hex, this_process(), 0, ""
        self._over, self._lost = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def held(self, wait: bool) -> Iterator[Callable[[], None]]:
        """Hold it while the block runs, which is given `check`. UserError names a holder who is alive, unless we
        `wait`."""
        self._take(wait)
        thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        thread.start()
        try:
            yield self.check
        finally:
            self._over.set()
            thread.join(self._terms.join)
            if not thread.is_alive() and not self._lost.is_set():
                with contextlib.suppress(StorageError):  # it ends by itself
                    self._brisk.replace(self._record(free=True), self._tag)

    def is_held(self) -> bool:
        """Whether somebody holds it, who renews it; without a hold of one's own. Where the server does not tell the
        time, it is watched for as long as a lease lasts without a renewal."""
        first, since = self._place.look(), time.monotonic()
        if first is None or self._is_free(first):
            return False
        seen: Seen | None = first
        while first.age_seconds is None and seen is not None and seen.tag == first.tag:
            if self._is_over(since):
                return False
            time.sleep(self._terms.look)
            seen = self._place.look()
        return seen is not None and not self._is_free(seen)

    def check(self) -> None:
        """Failed where another process has taken the lease."""
        if self._lost.is_set():
            raise Failed(
                f"{self._what} was taken over by another process, for this one could not renew its lease in "
                f"{self._terms.lease:g} s; it stops here"
            )

    def _take(self, wait: bool) -> None:
        first: Seen | None = None
        since, warned = 0.0, False
        while True:
            if (seen := self._place.look()) is None:
                tag = self._place.create(self._record())
            elif self._is_free(seen) or (first is not None and first.tag == seen.tag and self._is_over(since)):
                tag = self._place.replace(self._record(), seen.tag)
            else:
                tag = None
            if tag is not None:
                self._tag = tag
                return
            if seen is None or (first is not None and first.tag == seen.tag):
                time.sleep(self._terms.look)
                continue
            holder = self._read(seen)["holder"]
            if first is not None and holder is not None and not wait:
                raise held_by(self._what, holder)
            if holder is not None and not warned:
                warnings.warn(
                    f"{self._what} is held by {holder}: for up to {self._terms.lease:g} s it is seen whether that is "
                    "alive",
                    stacklevel=5,
                )
                warned = True
            first, since = seen, time.monotonic()

    def _is_free(self, seen: Seen) -> bool:
        aged = seen.age_seconds is not None and seen.age_seconds > self._terms.lease
        return aged or self._read(seen)["holder"] is None

    def _is_over(self, since: float) -> bool:
        return time.monotonic() - since > self._terms.lease

    def _read(self, seen: Seen) -> dict[str, str | None]:
        try:
            record = json.loads(seen.data)
            if record["format"] == FORMAT:
                return {name: record[name] for name in ("holder", "token")}
        except (ValueError, TypeError, KeyError):
            pass
        raise UserError(
            f"{self._place}: is no lease that this version knows; use the version that wrote it, or delete it"
        )

    def _record(self, free: bool = False) -> bytes:
        self._number += 1
        holder = None if free else self._holder
        record = {"format": FORMAT, "holder": holder, "token": self._token, "number": self._number}
        return json.dumps(record, sort_keys=True).encode()

    def _renew(self) -> None:
        renewed, warned = time.monotonic(), False
        while not self._over.wait(self._terms.renew):
            begun = time.monotonic()
            try:
                tag = self._brisk.replace(self._record(), self._tag) or self._still_ours()
            except (StorageError, UserError) as error:  # until somebody else takes it, it is ours
                if not warned and self._is_over(renewed):
                    warned = True
                    warnings.warn(
                        f"{self._what}: its lease could not be renewed for {self._terms.lease:g} s, and whoever asks "
                        f"for it now may take it: {one_line(error)}",
                        stacklevel=1,
                    )
                continue
            if tag is None:
                self._lost.set()
                return
            self._tag, renewed, warned = tag, begun, False

    def _still_ours(self) -> str | None:
        """The tag, if what is there is a renewal whose answer did not reach us."""
        seen = self._brisk.look()
        return seen.tag if seen is not None and self._read(seen)["token"] == self._token else None
