"""The same images in every kind of container, as the tools of each would write it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources import NO_LABEL
from tests.data.data_helpers import (
    Known,
    Written,
    in_tree,
    known_images,
    png,
    tree,
    write_files,
    write_idx,
    write_tar,
    write_zip,
)

KNOWN = known_images()
GREY = known_images(channels=1)
TEN = known_images(classes=10)
NAMED = tuple(f"class{i}" for i in range(3))
NUMBERED = tuple("012")

TRAIN = [i for i, split in enumerate(KNOWN.splits) if split == "train"]
TEST = [i for i, split in enumerate(KNOWN.splits) if split != "train"]


def unsplit(known: Known) -> Known:
    return known._replace(splits=[None] * len(known.labels))


def unlabelled(known: Known) -> Known:
    return unsplit(known)._replace(labels=[NO_LABEL] * len(known.labels))


def numbered(name: str, numbers: list[int]) -> Written:
    return [(f"{name}/{place}", number) for place, number in enumerate(numbers)]


Kind = Callable[[Path], tuple[Path, Known, Written, tuple[str, ...]]]


def folder(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    write_files(at / "images", tree(KNOWN))
    return at / "images", KNOWN, in_tree(KNOWN), NAMED


def zip_deflated(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    write_zip(at / "images.zip", {f"dataset/{name}": data for name, data in reversed(tree(KNOWN).items())})
    return at / "images.zip", KNOWN, in_tree(KNOWN), NAMED


def zip_stored(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    write_zip(at / "IMAGES.ZIP", tree(KNOWN), zipfile.ZIP_STORED)
    return at / "IMAGES.ZIP", KNOWN, in_tree(KNOWN), NAMED


def tar(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    write_tar(at / "images.tar", {f"./dataset/{name}": data for name, data in reversed(tree(KNOWN).items())})
    return at / "images.tar", KNOWN, in_tree(KNOWN), NAMED


def webdataset(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    files = {}
    for i, pixels in enumerate(KNOWN.pixels):
        files[f"{i:03d}.png"] = png(pixels)
        files.update({f"{i:03d}.cls": b"%d\n" % KNOWN.labels[i]} if i % 2 else {})
        files.update({f"{i:03d}.json": json.dumps({"label": KNOWN.labels[i]}).encode()} if not i % 2 else {})
    write_tar(at / "000000.tar", files)
    return at / "000000.tar", unsplit(KNOWN), [(f"{i:03d}.png", i) for i in range(12)], NUMBERED


def parquet(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    (at / "data").mkdir()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMED), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", image), ("label", pa.int64())], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    files = {
        "train-00000-of-00002.parquet": TRAIN[:5],
        "train-00001-of-00002.parquet": TRAIN[5:],
        "test-00000-of-00001.parquet": TEST,
    }
    for name, numbers in files.items():
        rows = [{"bytes": png(KNOWN.pixels[i]), "path": "image.png"} for i in numbers]
        table = pa.table({"image": rows, "label": [KNOWN.labels[i] for i in numbers]}, schema)
        pq.write_table(table, at / "data" / name, row_group_size=2)
    (at / "data" / "README.md").write_text("a card")
    written = [title for name in sorted(files) for title in numbered(name, files[name])]
    return at / "data", KNOWN, written, NAMED


def parquet_plain(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    images = pa.array([png(pixels) for pixels in KNOWN.pixels], pa.large_binary())
    pq.write_table(pa.table({"fine_label": pa.array(KNOWN.labels, pa.uint8()), "img": images}), at / "all.parquet")
    return at / "all.parquet", unsplit(KNOWN), numbered("all.parquet", list(range(12))), NUMBERED


def idx(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    for role, numbers, end in (("train", TRAIN, ".gz"), ("t10k", TEST, "")):
        write_idx(at / f"{role}-images-idx3-ubyte{end}", GREY.pixels[numbers])
        write_idx(at / f"{role}-labels-idx1-ubyte{end}", np.array(GREY.labels)[numbers])
    written = numbered("t10k-images-idx3-ubyte", TEST) + numbered("train-images-idx3-ubyte.gz", TRAIN)
    return at, GREY, written, NUMBERED


def idx_file(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    idx(at)
    chosen = Known(GREY.pixels, GREY.labels, [None] * 12)
    return at / "train-images-idx3-ubyte.gz", chosen, numbered("train-images-idx3-ubyte.gz", TRAIN), NUMBERED


def npy(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    np.save(at / "images.npy", KNOWN.pixels.transpose(0, 3, 1, 2))
    return at / "images.npy", unlabelled(KNOWN), numbered("images.npy", list(range(12))), ()


def npy_fortran(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    np.save(at / "images.npy", np.asfortranarray(GREY.pixels[..., None]))
    return at / "images.npy", unlabelled(GREY), numbered("images.npy", list(range(12))), ()


def npz_keras(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    labels = np.array(KNOWN.labels)
    arrays = {"x_train": KNOWN.pixels[TRAIN], "y_train": labels[TRAIN], "x_test": KNOWN.pixels[TEST]}
    np.savez_compressed(at / "set.npz", **arrays, y_test=labels[TEST].astype(np.uint8)[:, None])
    return at / "set.npz", KNOWN, numbered("x_train", TRAIN) + numbered("x_test", TEST), NUMBERED


def npz_medmnist(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    parts = {"train": TRAIN, "val": TEST[:1], "test": TEST[1:]}
    images = {f"{name}_images": GREY.pixels[numbers] for name, numbers in parts.items()}
    labels = {f"{name}_labels": np.array(GREY.labels)[numbers, None] for name, numbers in parts.items()}
    np.savez(at / "set.npz", **images, **labels)
    written = [title for name, numbers in parts.items() for title in numbered(f"{name}_images", numbers)]
    return at / "set.npz", GREY, written, NUMBERED


def npz_adm(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    np.savez(at / "samples.npz", KNOWN.pixels, np.array(KNOWN.labels), mu=np.zeros(4), sigma=np.zeros((4, 4)))
    return at / "samples.npz", unsplit(KNOWN), numbered("arr_0", list(range(12))), NUMBERED


def npz_fortran(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    np.savez_compressed(at / "set.npz", images=np.asfortranarray(KNOWN.pixels), labels=np.array(KNOWN.labels, ">i2"))
    return at / "set.npz", unsplit(KNOWN), numbered("images", list(range(12))), NUMBERED


def cifar10(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    files = {f"data_batch_{n + 1}.bin": TRAIN[n::5] for n in range(5)} | {"test_batch.bin": TEST}
    for name, numbers in files.items():
        records = [bytes([TEN.labels[i]]) + TEN.pixels[i].transpose(2, 0, 1).tobytes() for i in numbers]
        (at / name).write_bytes(b"".join(records))
    names = tuple(f"name{i}" for i in range(10))
    (at / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return at, TEN, [title for name, numbers in files.items() for title in numbered(name, numbers)], names


def cifar100(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    for name, numbers in (("train.bin", TRAIN), ("test.bin", TEST)):
        records = [bytes([99, TEN.labels[i]]) + TEN.pixels[i].transpose(2, 0, 1).tobytes() for i in numbers]
        (at / name).write_bytes(b"".join(records))
    return at, TEN, numbered("test.bin", TEST) + numbered("train.bin", TRAIN), tuple(map(str, range(100)))


def tars(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    """Shards of a WebDataset, the held-out ones in a folder of their own."""
    files = {"train-000.tar": TRAIN[:5], "train-001.tar": TRAIN[5:], "more/test-000.tar": TEST}
    (at / "set" / "more").mkdir(parents=True)
    for name, numbers in files.items():
        pictures = {f"{i:03d}.png": png(KNOWN.pixels[i]) for i in numbers}
        write_tar(at / "set" / name, {**pictures, **{f"{i:03d}.cls": b"%d" % KNOWN.labels[i] for i in numbers}})
    (at / "set" / "README.md").write_text("a card")
    written = [(f"{name}/{i:03d}.png", i) for name in sorted(files) for i in files[name]]
    return at / "set", KNOWN, written, NUMBERED


def tars_of_classes(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    """A tar for each class: the folder that all its images lie in is no wrapping."""
    (at / "set").mkdir()
    for label in range(3):
        numbers = [i for i in range(12) if KNOWN.labels[i] == label]
        write_tar(at / "set" / f"{label}.tar", {f"class{label}/{i:03d}.png": png(KNOWN.pixels[i]) for i in numbers})
    written = [(f"{i % 3}.tar/class{i % 3}/{i:03d}.png", i) for i in sorted(range(12), key=lambda i: (i % 3, i))]
    return at / "set", unsplit(KNOWN), written, NAMED


def tars_of_splits(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    (at / "set").mkdir()
    for name, numbers in (("training", TRAIN), ("val", TEST)):
        files = {f"{name}/class{KNOWN.labels[i]}/{i:03d}.png": png(KNOWN.pixels[i]) for i in numbers}
        write_tar(at / "set" / f"of-{name}.tar", files)
    numbers = sorted(range(12), key=lambda i: (i in TEST, KNOWN.labels[i], i))
    written = [(f"of-{'val' if i in TEST else 'training'}.tar/class{KNOWN.labels[i]}/{i:03d}.png", i) for i in numbers]
    return at / "set", KNOWN, written, NAMED


def parquet_in_folders(at: Path) -> tuple[Path, Known, Written, tuple[str, ...]]:
    """As a hub converts a data set: a configuration, below it the splits."""
    files = {"default/train/0000.parquet": TRAIN[:5], "default/train/0001.parquet": TRAIN[5:]}
    files["default/test/0000.parquet"] = TEST
    for name, numbers in files.items():
        (at / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        columns = {"image": [{"bytes": png(KNOWN.pixels[i])} for i in numbers]}
        pq.write_table(pa.table({**columns, "label": [KNOWN.labels[i] for i in numbers]}), at / "hub" / name)
    (at / "hub" / "README.md").write_text("a card")
    written = [title for name in sorted(files) for title in numbered(name, files[name])]
    return at / "hub", KNOWN, written, NUMBERED


KINDS = {
    "folder": [folder],
    "zip": [zip_deflated, zip_stored],
    "tar": [tar, webdataset, tars, tars_of_classes, tars_of_splits],
    "parquet": [parquet, parquet_plain, parquet_in_folders],
    "idx": [idx, idx_file],
    "npy": [npy, npy_fortran],
    "npz": [npz_keras, npz_medmnist, npz_adm, npz_fortran],
    "cifar": [cifar10, cifar100],
}
