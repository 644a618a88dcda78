"""Places where files live, and the one way to write them: whole or not at all.

A `Place` is a folder or a file: everything in the store is read and written through it, as bytes, so that no other
module knows what kind of storage is below. Local commit: write to a temporary name, fsync, rename, fsync the parent.
How S3, which has neither renames nor locks, keeps the same promises is in `pipelines.s3`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from pipelines.errors import UserError, one_line
from pipelines.files import LocalFile, RangeFile, StorageError
from pipelines.locks import holding, is_held

MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1
TEMPORARY = ".tmp-"


class DamageError(ValueError):
    """Stored bytes are not what their record says; the message names the file."""


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. What every digest of a structure is taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256(data: bytes | memoryview | str) -> str:
    """Hex sha256 of bytes, or of a text's UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def identity(value: Any) -> str:
    """Hex sha256 of a structure in canonical JSON."""
    return sha256(canonical_json(value))


@dataclass(frozen=True, eq=False, repr=False)
class Place:
    """A folder or a file of the store. `Place.of(uri) / "runs" / "digits-..."`."""

    path: Path
    is_local: ClassVar[bool] = True
    """Whether it is on this host's file system: there, reading costs no requests and a dead holder's lock is free."""

    @staticmethod
    def of(uri: str | os.PathLike[str]) -> "Place":
        """The place at a path, a file:// or an s3://bucket/prefix address. UserError for any other."""
        text = os.fspath(uri)
        scheme, separator, rest = text.partition("://")
        if not separator:
            return Place(Path(text).expanduser().absolute())
        if scheme == "file":
            return Place(Path(rest).expanduser().absolute())
        if scheme == "s3":
            from pipelines.s3 import S3Place  # those who read S3 alone wait for pyarrow

            return S3Place.of(text)
        raise UserError(f"storage {text}: {scheme} is not known here; give a path, or s3://bucket/prefix")

    def __truediv__(self, name: str) -> "Place":
        return Place(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "Place":
        """The folder that this is in."""
        return Place(self.path.parent)

    def is_within(self, folder: str | os.PathLike[str]) -> bool:
        """Whether this is a folder of this host's, or lies below it, whatever links lead there."""
        return self.path.resolve().is_relative_to(Path(folder).resolve())

    def exists(self) -> bool:
        return self.path.exists()

    def list(self) -> list[str]:
        """Names of the finished entries of this folder, sorted; none where there is no folder."""
        try:
            return sorted(n for n in os.listdir(self.path) if not n.startswith(TEMPORARY))
        except FileNotFoundError:
            return []

    def find(self, suffix: str) -> Sequence[str]:
        """Paths of the finished files below this folder that end so, in small letters or large, with forward slashes,
        sorted; hidden ones not. Links are followed, to each folder once. StorageError where a folder cannot be read.
        """

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise StorageError(f"{error.filename}: cannot be read: {one_line(error)}")

        found, seen = [], set[tuple[int, int]]()
        for folder, subfolders, names in os.walk(self.path, onerror=refuse, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            below = Path(folder).relative_to(self.path)
            found += [(below / n).as_posix() for n in names if n.lower().endswith(suffix) and not n.startswith(".")]
        return sorted(found)

    def size(self) -> int:
        """Bytes of this file. FileNotFoundError where there is none."""
        return self.path.stat().st_size

    def changed(self) -> int:
        """When this file was last changed, nanoseconds since the epoch. FileNotFoundError where there is none."""
        return self.path.stat().st_mtime_ns

    def open(self) -> RangeFile:
        """This file, to be read in parts. FileNotFoundError where there is none."""
        try:
            return LocalFile(str(self), os.open(self.path, os.O_RDONLY))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self}: cannot be read: {one_line(error)}") from None

    def read(self) -> bytes:
        """All bytes of this file. FileNotFoundError where there is none."""
        return self.path.read_bytes()

    def read_json(self) -> Any:
        return json.loads(self.read())

    def write(self, data: bytes) -> None:
        """Commit one file: after this returns it is whole and durable, and a kill before leaves the old one."""
        with self.writing() as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """This file, to be written in parts: committed as by `write` when the block has ended well, else not at all."""
        temporary = self._unfinished()
        try:
            with _durable(temporary) as file:
                yield file
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(self.path.parent)

    def write_json(self, value: Any) -> None:
        self.write((json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def delete(self) -> None:
        """Delete this file; nothing happens where there is none."""
        self.path.unlink(missing_ok=True)

    def claim(self, data: bytes) -> bool:
        """Create this file if it does not exist; False where somebody else was first."""
        temporary = self._unfinished()
        try:
            _write_durably(temporary, data)
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        _sync_folder(self.path.parent)
        return True

    def commit_folder(self, files: Mapping[str, bytes], check: Callable[[], None] | None = None) -> dict[str, Any]:
        """Commit a folder of files with a manifest (sha256 of each); the folder appears whole or not at all. `check`,
        called when all but that is done, may still refuse by what it raises.

        A folder that is there already under this name is replaced; a kill in that moment may leave neither, and what
        is committed so can be made again. Returns the manifest.
        """
        manifest = manifest_of(files)
        temporary = self._unfinished()
        temporary.mkdir()
        try:
            for name, data in files.items():
                _write_durably(temporary / name, data)
            _write_durably(temporary / MANIFEST, dump_manifest(manifest))
            _sync_folder(temporary)
            if self._holds(manifest):  # by a writer of the same bits
                shutil.rmtree(temporary)
                return manifest
            if check is not None:
                check()
            self.remove()
            os.rename(temporary, self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(self.path.parent)
        return manifest

    def _unfinished(self) -> Path:
        """A name for what is to be renamed to this, in its folder, which is made."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"

    def committed(self) -> Sequence[str]:
        """Names of the committed folders in this folder, sorted."""
        return [name for name in self.list() if (self / name / MANIFEST).exists()]

    def _holds(self, manifest: Mapping[str, Any]) -> bool:
        """Whether this folder is whole and what the manifest says."""
        try:
            self.read_folder()
            return (self / MANIFEST).read_json() == manifest
        except (DamageError, UserError):
            return False

    def read_folder(self, *names: str) -> dict[str, bytes]:
        """Read files of a committed folder (all of them if none is named), each checked against the manifest.

        Raises DamageError, naming the file, where one is missing or differs.
        """
        try:
            manifest = (self / MANIFEST).read_json()
        except (FileNotFoundError, NotADirectoryError):
            raise DamageError(f"{self / MANIFEST} is missing") from None
        except ValueError as error:
            raise DamageError(f"{self / MANIFEST} is not JSON: {error}") from None
        if not (isinstance(manifest, dict) and {"format", "files"} <= manifest.keys()):
            raise DamageError(f"{self / MANIFEST} is not a manifest")
        if manifest["format"] != MANIFEST_FORMAT:
            raise UserError(f"{self / MANIFEST} has format {manifest['format']}: this version reads {MANIFEST_FORMAT}")
        files = {}
        for name in names or manifest["files"]:
            try:
                data = (self / name).read()
            except FileNotFoundError:
                raise DamageError(f"{self / name} is missing") from None
            if sha256(data) != manifest["files"].get(name):
                raise DamageError(f"{self / name} does not match the sha256 in its manifest")
            files[name] = data
        return files

    def remove(self) -> None:
        """Delete this folder: renamed out of sight first, so that no reader finds half of it."""
        temporary = self.path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, temporary)
            shutil.rmtree(temporary)

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left half-written in this folder. Only for the holder of its lock."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.path):
                if entry.name.startswith(TEMPORARY):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)

    @contextlib.contextmanager
    def lock(self, what: str, wait: bool = False) -> Iterator[Callable[[], None]]:
        """Hold this file as a lock while the block runs; where it is held, wait, or UserError naming the holder.

        The kernel frees a dead holder's lock at once. What the block is given is for those who hold it long: called,
        it is Failed where somebody else holds it by now, to which only a lease can come (`pipelines.s3_lease`).
        """
        with holding(self.path, what, wait):
            yield lambda: None

    def is_held(self) -> bool:
        """Whether anybody holds this file as a lock; nobody's hold is changed by the look."""
        return is_held(self.path)


def manifest_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a folder of these files is committed with."""
    return {"format": MANIFEST_FORMAT, "files": {name: sha256(data) for name, data in sorted(files.items())}}


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def check_writable(place: Place) -> None:
    """UserError where files cannot be made below this place."""
    probe = place / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        probe.write(b"")
        probe.delete()
    except OSError as error:
        raise UserError(
            f"storage {place}: cannot write there ({error.strerror}); name a folder that you may write to"
        ) from None


def check_store(place: Place) -> None:
    """UserError where this place cannot hold a store."""
    check_writable(place)
    if not place.is_local:
        from pipelines.s3 import S3Place, check_conditional

        assert isinstance(place, S3Place)
        check_conditional(place)


def _write_durably(path: Path, data: bytes) -> None:
    with _durable(path) as file:
        file.write(data)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a full disk is met by a descriptor, which has no name
            error.filename = str(path.parent)
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
