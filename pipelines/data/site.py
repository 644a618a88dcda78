"""A folder that is being made a dataset: who is at it, on what, and which of its files are theirs.

    ingest.json         the mark: verb, source and identity of the work, and the files that it may have written
    .ddpm-ingest/       records of what is finished, as long as the work lasts
    .ddpm-ingest.lock   held by the one process that is at it, where the folder is local

A dataset's files have plain names, and the folder may be one in which its user keeps other things: nothing is written
over or deleted but what the mark lists, and where a file of such a name is not listed the folder is refused.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines.data.manifest import BEGUN, CARD, CARD_PAGE, FORMAT, SHARDS, SHEET, Dataset
from pipelines.errors import UserError
from pipelines.store import Place, check_writable

RECORDS = ".ddpm-ingest"
_LOCK = ".ddpm-ingest.lock"


@dataclass(frozen=True)
class _Mark:
    verb: str
    source: str
    identity: str
    """Empty when the dataset is finished: with times of files in it, it would be all that differs between two."""
    files: tuple[str, ...] = ()
    format: int = FORMAT


class Site:
    """`out`, where `verb` makes the dataset of a source; `identity` tells that from any other work there could be.

    `ours()` names the files in `out` that look as if it had written them.
    """

    def __init__(self, out: Place, verb: str, source: str, identity: str, ours: Callable[[], Iterable[str]]) -> None:
        self.out = out
        self.records = out / RECORDS
        self._mark = _Mark(verb, source, identity)
        self._ours = ours
        self._is_as_it_was = False

    def dataset(self, known: Callable[[], Dataset], make: Callable[[], Dataset]) -> Dataset:
        """The dataset that is there already, if `known` takes it for the one asked for, or what `make` makes.

        `make` runs in one process at a time, and a killed one is gone on with. UserError where another is at it, or
        where something else is in the folder. A UserError of `make` leaves the folder as it was, or, where files were
        claimed or an earlier attempt has left some, as a kill does: for the next attempt.
        """
        if (self.out / CARD).exists() and not self._is_left():
            return known()
        with self._held():
            # Looked for again: another process may have finished it before the folder was ours.
            if (self.out / CARD).exists():
                dataset = known()
            else:
                self._begin()
                try:
                    dataset = make()
                except UserError:
                    self._withdraw()
                    raise
            self._finish()
        return dataset

    def claim(self, names: Iterable[str]) -> None:
        """Say which files will be written: these, and those that make them a dataset. What an earlier attempt has
        written beyond them is deleted. UserError as by `confirm`."""
        self.confirm()
        files = {*names, SHARDS, SHEET, CARD_PAGE}
        for name in {*self._ours()}.intersection(self._mark.files) - files:
            (self.out / name).delete()
        self._is_as_it_was = False
        self._write(tuple(sorted(files)))

    def confirm(self) -> None:
        """UserError where another process was at work in the folder, from which nothing keeps it on S3."""
        found = self._read()
        if found is None or (found.verb, found.identity) != (self._mark.verb, self._mark.identity):
            raise UserError(
                f"{self.out}: another process was at work here meanwhile; start again, or name another folder"
            )

    def _begin(self) -> None:
        found = self._read()
        listed = () if found is None else found.files
        if found is not None and found.verb != self._mark.verb:
            raise UserError(f"{self.out}: an unfinished {found.verb} of {found.source} is here; name another folder")
        if foreign := next((name for name in self._ours() if name not in listed), None):
            raise _foreign(self.out, foreign)
        if found is not None and found.identity not in ("", self._mark.identity) and not self.out.is_local:
            # Without a lock nobody knows whether it is still being made.
            raise UserError(
                f"{self.out}: an unfinished {found.verb} of {found.source} is here, of other images or settings; "
                "name another folder, or delete this one if nobody is at it"
            )
        if found is not None and found.identity not in ("", self._mark.identity):
            warnings.warn(
                f"{self.out}: an unfinished {found.verb} of {found.source}, of other images or settings, is replaced",
                stacklevel=5,
            )
        self._is_as_it_was = found is None
        self._write(listed)

    def _finish(self) -> None:
        if found := self._read():
            (self.out / BEGUN).write_json(asdict(replace(found, identity="")))
        self.records.remove()

    def _withdraw(self) -> None:
        if self._is_as_it_was:
            self.records.remove()
            (self.out / BEGUN).delete()

    def _read(self) -> _Mark | None:
        try:
            found = (self.out / BEGUN).read_json()
        except FileNotFoundError:
            return None
        except (ValueError, IsADirectoryError):
            raise _foreign(self.out, BEGUN) from None
        if not isinstance(found, dict) or not asdict(self._mark).keys() <= found.keys():
            raise _foreign(self.out, BEGUN)
        if found.get("format") != FORMAT:
            raise UserError(
                f"{self.out / BEGUN}: format {found.get('format')} is not known here, only {FORMAT}; use the version "
                "that wrote it"
            )
        files = tuple(name for name in found["files"] if ".." not in name.split("/") and not name.startswith("/"))
        return _Mark(found["verb"], found["source"], found["identity"], files)

    def _write(self, files: tuple[str, ...]) -> None:
        self._mark = replace(self._mark, files=files)
        (self.out / BEGUN).write_json(asdict(self._mark))

    def _is_left(self) -> bool:
        """Whether an attempt was here that did not come to its end."""
        return self.records.exists() or (self.out / _LOCK).exists()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the folder, where it can be held: on S3 two who do the same write the same."""
        if not self.out.is_local:
            check_writable(self.out)
            yield
            return
        existed, left = self.out.exists(), self._is_left()
        try:
            lock = self._lock()
        except OSError:
            check_writable(self.out)  # which says what is wrong with it
            raise
        with lock:
            try:
                check_writable(self.out)
                if left:
                    self._sweep()
                yield
            finally:
                (self.out / _LOCK).delete()
                if not existed:
                    with contextlib.suppress(OSError):  # it is not empty, mostly
                        os.rmdir(self.out.path)

    def _lock(self) -> contextlib.ExitStack:
        """The lock, held. Its holder deletes it at the end: who has opened it before must not take that file for it."""
        file, folder = self.out / _LOCK, self.out.path
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:
                file.path.touch()
                number = file.path.stat().st_ino
                held.enter_context(file.lock(f"the dataset in {self.out}"))
                if file.path.stat().st_ino == number:
                    return held.pop_all()

    def _sweep(self) -> None:
        """Remove what killed writers have left half-written."""
        found = self._read()
        for folder in {".", *(str(Path(name).parent) for name in (found.files if found else ()))}:
            (self.out / folder).sweep_temporaries()


def _foreign(out: Place, name: str) -> UserError:
    return UserError(f"{out}: {name} is there and not from an unfinished work; name another folder")
