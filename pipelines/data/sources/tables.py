"""Parquet files with the bytes of images, as the hubs of data sets export them. They are read some rows at a time.

The column `image` or `img` holds image files, as bytes or as a struct with `bytes`. Labels are the integers of
`label`, `labels` or `fine_label`; their names are in the schema's metadata, where Hugging Face's `datasets` wrote it.
"""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.sources.base import NO_LABEL, as_labels, numbered_classes, place
from pipelines.data.sources.files import check_text, fingerprint, printable, refused, unreadable
from pipelines.data.sources.images import check_image_bytes, decode_image
from pipelines.data.sources.paths import own_split, split_of_file
from pipelines.errors import UserError

if TYPE_CHECKING:  # it takes half a second, which those pay who open a table
    import pyarrow.parquet as pq

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_BATCH_ROWS = 16
_BUFFER = 2**20
"""Bytes that are read at a time. Without it a row group's whole column would be, which may be all of the file."""


class File(NamedTuple):
    """One Parquet file as it was found at opening."""

    name: str
    """Its path below the folder, with forward slashes."""
    group_ends: tuple[int, ...]
    """Rows up to the end of each row group."""
    column: str
    """Path of the column with the bytes."""
    labels: NDArray[np.int32] | None
    names: tuple[str, ...] | None
    """Of the classes, where the schema has them."""


class Table:
    """The images of one Parquet file, or of those below a folder sorted by path, in the order of their rows."""

    kind = "parquet"

    def __init__(self, path: Path, folder: Path, files: Sequence[File]) -> None:
        self.name = str(path)
        named = next((file.names for file in files if file.names), None)
        self.classes = named or numbered_classes([file.labels for file in files if file.labels is not None])
        self._folder = folder
        self._files = tuple(files)
        self._ends = tuple(accumulate(file.group_ends[-1] if file.group_ends else 0 for file in files))
        self._splits = own_split({file.name: split_of_file(file.name) for file in files})
        self._rows: tuple[int, int, _Rows] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def title(self, index: int) -> str:
        number, row = place(self._ends, index)
        return f"{self._files[number].name}/{row}"

    def label(self, index: int) -> int:
        number, row = place(self._ends, index)
        labels = self._files[number].labels
        return NO_LABEL if labels is None else int(labels[row])

    def split(self, index: int) -> str | None:
        return self._splits[self._files[place(self._ends, index)[0]].name] if self._splits else None

    def load(self, index: int) -> Image.Image:
        number, row = place(self._ends, index)
        file = self._files[number]
        called = f"{self._folder / file.name}: row {row}"
        group, position = place(file.group_ends, row)
        if self._rows is None or self._rows[:2] != (number, group) or position < self._rows[2].first:
            self._rows = None
            self._rows = (number, group, _Rows(self._folder / file.name, group, file.column))
        data = self._rows[2].bytes_of(position)
        if data is None:
            raise refused(called, "no image; remove the row, or write the image's bytes into it")
        check_image_bytes(len(data), called)
        return decode_image(data, called)

    def fingerprint(self) -> str:
        return fingerprint(self._folder, [file.name for file in self._files])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


class _Rows:
    """Images of one row group, read forwards: a few rows, and the page they lie in, are in memory at a time."""

    def __init__(self, path: Path, group: int, column: str) -> None:
        self.first = 0
        """First row of the batch in memory."""
        self._path = path
        self._batch: Any = ()
        file = _open_parquet(path)
        try:
            self._batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)
        except Exception as error:
            raise unreadable(path, "a Parquet file", error) from None

    def bytes_of(self, row: int) -> bytes | None:
        """The image file in a row of the row group, at or after `first`; None where there is none."""
        while row >= self.first + len(self._batch):
            self.first += len(self._batch)
            try:
                self._batch = next(self._batches).column(0)
            except Exception as error:  # StopIteration too: fewer rows than the file's footer says
                raise unreadable(self._path, "a Parquet file", error) from None
        value = self._batch[row - self.first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value


def open_table(path: Path, names: Sequence[str] = ()) -> Table:
    """Images of a Parquet file, or of those of these names below a folder. UserError where one has no column of them.

    The split is in the names of the files or of their folders, as the hubs have it.
    """
    folder = path if names else path.parent
    names = names or [path.name]
    check_text(names, folder)
    files = [_read_file(folder, name) for name in names]
    labelled = [file for file in files if file.labels is not None]
    for file in labelled:
        if file.names != labelled[0].names:
            raise refused(
                folder / file.name, f"its classes are not named as those of {labelled[0].name}; give them separately"
            )
    table = Table(path, folder, files)
    if not len(table):
        raise refused(path, "no image in it, as it has no rows; give files that have")
    return table


def is_table(name: str) -> bool:
    """Whether a file's name is that of a Parquet file."""
    return name.lower().endswith(".parquet")


def has_images(path: Path) -> bool:
    """Whether a Parquet file has a column of images, and does not just tell of some. UserError for a damaged one."""
    schema = _open_parquet(path).schema_arrow
    try:
        _image_column(schema, path)
    except UserError:
        return False
    return True


def _read_file(folder: Path, called: str) -> File:
    path = folder / called
    file = _open_parquet(path)
    try:
        schema, metadata = file.schema_arrow, file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        column = _image_column(schema, path)
        name = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        labels = names = None
        if name is not None:
            names = _class_names(schema, name)
            values = file.read(columns=[name], use_threads=False).column(0)
            labels = _labels(values, f"{path}: {name}", names)
            if len(labels) != sum(sizes):
                raise ValueError(f"{len(labels):,} labels are not the {sum(sizes):,} of its rows")
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, "a Parquet file", error) from None
    return File(called, tuple(accumulate(sizes)), column, labels, names)


def _open_parquet(path: Path) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except Exception as error:  # Arrow's errors, and those of the file system
        raise unreadable(path, "a Parquet file", error) from None


def _image_column(schema: Any, path: Path) -> str:
    """Path of the leaf column with the images' bytes."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    for name in _IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if is_bytes(kind):
                return name
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type):
                return f"{name}.bytes"
            raise refused(
                path,
                f"column {name} is {printable(kind)[:80]}, not image files; write their bytes into it, or a struct "
                "with `bytes`",
            )
    listed = ", ".join(printable(name) for name in schema.names[:10])
    raise refused(
        path, f"no column {' or '.join(_IMAGE_COLUMNS)} among {listed or 'none'}; name the column of images so"
    )


def _labels(values: Any, called: str, names: tuple[str, ...] | None) -> NDArray[np.int32]:
    """Labels of a column, NO_LABEL where it is null."""
    from pyarrow import types

    if not types.is_integer(values.type):
        raise refused(called, f"a column of {printable(values.type)[:80]}, not of integers; convert or remove it")
    array = values.fill_null(0).to_numpy()
    empty = values.is_null().to_numpy()
    labels = as_labels(array, called, *((len(names),) if names else ()))
    return np.where(empty, np.int32(NO_LABEL), labels)


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Names of a label column's classes, by what `datasets` writes into the schema; None where they are not there."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
