"""A finished job's images in the forms that other tools read, beside its shards: written as a stream, or not at all."""

import re
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from pipelines.errors import UserError
from pipelines.sample.finish import Samples
from pipelines.sample.job import IMAGES, Job, job_at
from pipelines.store import Place

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time that a zip's entries have: the same bytes whenever they are written."""
_WRITERS = 8
"""PNG files under way at a time, most of which are requests to a server."""
_PICTURE = re.compile(r"\d{9,}\.png")
_KEPT = "forms.json"
"""How many images each form that is there has."""


def write_form(samples: Samples, form: str) -> str:
    """Write the first n images in a form of `FORMS`; where it is. UserError for another form."""
    check_form(form)
    job = job_at(Place.of(samples.out))
    with job.held() as check_held:
        _note(job, form, None)  # until it is written
        written = FORMS[form](job, samples.n)
        check_held()
        _note(job, form, samples.n)
    return str(written)


def write_images(job: Job, pictures: Mapping[int, bytes]) -> dict[int, str]:
    """Write single images as PNG files, by index, into the folder of the PNG form; their files. Only for the holder of
    the job's lock."""
    folder = job.place / IMAGES
    folder.sweep_temporaries()
    count = _kept(job).get("png")
    if count is not None and max(pictures) >= count:
        _note(job, "png", None)  # it has others now
    files = {index: folder / _name(index) for index in pictures}
    for index, file in files.items():
        file.write(pictures[index])
    return {index: str(file) for index, file in files.items()}


def other_forms(samples: Samples) -> list[str]:
    """A line for each form that is there and has other images than these."""
    return [
        f"what `--format {form}` has written there has {'not' if count is None else f'{count:,} and not'} "
        f"{samples.n:,} images; the option writes it again"
        for form, count in sorted(_kept(job_at(Place.of(samples.out))).items())
        if count != samples.n
    ]


def _note(job: Job, form: str, count: int | None) -> None:
    (job.place / _KEPT).write_json({**_kept(job), form: count})


def _kept(job: Job) -> dict[str, int | None]:
    try:
        return {form: count for form, count in (job.place / _KEPT).read_json().items() if form in FORMS}
    except (FileNotFoundError, AttributeError, ValueError):
        return {}


def check_form(form: str) -> None:
    """UserError for a form that cannot be written."""
    if form not in FORMS:
        raise UserError(f"--format {form}: only {', '.join(FORMS)} can be written; shards are always there")


def _write_png(job: Job, n: int) -> Place:
    folder, written = job.place / IMAGES, set[str]()
    folder.sweep_temporaries()
    with ThreadPoolExecutor(_WRITERS) as writers:
        for part in job.parts_read(n):
            pictures = job.pictures(part)[: n - part.first]
            written |= {name for name, _ in pictures}
            list(writers.map(lambda picture: (folder / picture[0]).write(picture[1]), pictures))
    for name in set(folder.list()) - written:  # of a larger n: who reads the folder is to find n images
        if _PICTURE.fullmatch(name):
            (folder / name).delete()
    return folder


def _name(index: int) -> str:
    return f"{index:09d}.png"


def _write_npz(job: Job, n: int) -> Place:
    """As the evaluator of guided-diffusion (Dhariwal and Nichol 2021) reads it: `arr_0` with pixels uint8 [N, H, W, 3],
    and `arr_1` with the classes where there are any. Grey images have their one channel three times."""
    place = job.place / "samples.npz"
    height, width, _ = next(job.read(1))[0].shape
    with place.writing() as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _array(archive, "arr_0", (n, height, width, 3), np.dtype(np.uint8)) as entry:
            for pixels in job.read(n):
                entry.write(np.broadcast_to(pixels, (*pixels.shape[:3], 3)).tobytes())
        if job.classes is not None:
            with _array(archive, "arr_1", (n,), np.dtype(np.int64)) as entry:
                entry.write(np.asarray(job.labels(range(n)), dtype=np.int64).tobytes())
    return place


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> IO[bytes]:
    """An entry of an npz file that an array of this shape can be written to, in parts."""
    entry = archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True)
    described = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(entry, described)
    return entry


def _write_parquet(job: Job, n: int) -> Place:
    """A row an image: `image` with its PNG file as Hugging Face's datasets have it, `label` (-1 for none), `index` and
    `seed`; a row group a chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = job.place / "samples.parquet"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("index", pa.int64()), ("seed", pa.int64())])
    with place.writing() as file, pq.ParquetWriter(file, schema, compression="none") as writer:
        for part in job.parts_read(n):
            pictures = job.pictures(part)[: n - part.first]
            indices = range(part.first, part.first + len(pictures))
            rows = {
                "image": [{"bytes": data, "path": name} for name, data in pictures],
                "label": job.labels(indices),
                "index": list(indices),
                "seed": [job.settings.seed] * len(indices),
            }
            writer.write_table(pa.table(rows, schema=schema))
    return place


FORMS: Mapping[str, Callable[[Job, int], Place]] = {
    "png": _write_png,
    "npz": _write_npz,
    "parquet": _write_parquet,
}
