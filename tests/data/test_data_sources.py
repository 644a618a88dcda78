"""Any images in: modes, sizes, bad files; each mistake in one line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.data.recipe import Recipe
from pipelines.data.sources import NO_LABEL, Digits, load_image, open_source
from pipelines.errors import UserError
from tests.data.data_helpers import draw_pictures, refused


def test_digits_are_scikit_learns() -> None:
    known = load_digits()
    source = open_source("digits")
    assert len(source) == 1797
    assert [source.label(i) for i in range(1797)] == known.target.tolist()
    for i in range(0, 1797, 100):
        assert np.abs(np.asarray(source.load(i)) - known.images[i] * 255 / 16).max() <= 0.5
    assert np.asarray(source.load(0)).max() <= 255


def test_opening_and_fingerprinting_import_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.data.sources import open_source; open_source('digits').fingerprint(); "
        "print([m for m in ('sklearn', 'torch', 'webdataset', 'ray', 'mlflow', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folder_is_sorted_and_labelled(pictures: Path) -> None:
    Image.new("L", (5, 5)).save(pictures / "stray.JPG", "JPEG")
    (pictures / "notes.txt").write_text("not an image")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "cat" / "deeper").mkdir()
    Image.new("L", (5, 5)).save(pictures / "cat" / "deeper" / "z.bmp")
    with pytest.warns(UserWarning, match="1 file,") as warned:
        source = open_source(str(pictures))
    assert warned[0].filename == __file__
    titles = [source.title(i) for i in range(len(source))]
    assert len(titles) == 42
    assert titles == sorted(titles)
    assert source.classes == ("cat", "dog")
    labels = {title: source.label(i) for i, title in enumerate(titles)}
    assert (labels["cat/000.png"], labels["dog/001.png"], labels["cat/deeper/z.bmp"]) == (0, 1, 0)
    assert labels["stray.JPG"] == NO_LABEL


def test_links_are_followed_but_not_in_circles_and_other_files_are_counted(pictures: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (pictures / "cat").rename(elsewhere)
    (pictures / "cat").symlink_to(elsewhere)
    (pictures / "dog" / "again").symlink_to(pictures)
    (pictures / "dog" / "scan.tif").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"passed over in .*: 1 file,"):
        source = open_source(str(pictures))
    assert source.classes == ("cat", "dog")
    assert len(source) == 40


def test_links_to_folders_beside_do_not_multiply_the_images(pictures: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    draw_pictures(elsewhere, range(40, 44))
    for here, there in (("cat", pictures / "dog"), ("dog", pictures / "cat"), ("dog", elsewhere)):
        for name in "alz":  # before and behind the folders that are there, and more than once
            (pictures / here / f"{name}-{there.name}").symlink_to(there)
    (pictures / "aardvark").symlink_to(pictures / "cat")
    (pictures / "above").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"passed over in .*: 10 links to folders that are read already or lie above"):
        source = open_source(str(pictures))
    assert source.classes == ("cat", "dog")
    titles = [source.title(i) for i in range(len(source))]
    own = [f"{('cat', 'dog')[i % 2]}/{i:03d}.png" for i in range(40)]
    linked = [f"dog/a-elsewhere/{('cat', 'dog')[i % 2]}/{i:03d}.png" for i in range(40, 44)]
    assert titles == sorted(own + linked)


def test_pipes_are_passed_over_and_links_to_nowhere_are_named(pictures: Path) -> None:
    os.mkfifo(pictures / "cat" / "pipe.png")
    os.mkfifo(pictures / "pipe.parquet")
    with pytest.warns(UserWarning, match=r"passed over in .*: 2 special files \(a pipe, say\)"):
        assert len(open_source(str(pictures))) == 40
    (pictures / "cat" / "000.png").unlink()
    (pictures / "cat" / "000.png").symlink_to("nowhere.png")
    (pictures / "cat" / "002.png").unlink()
    (pictures / "cat" / "002.png").symlink_to("002.png")
    source = open_source(str(pictures))
    for index, name in enumerate(("000", "002")):
        with pytest.raises(UserError, match=rf"cat/{name}\.png: cannot be read"):
            source.load(index)


def test_fingerprint_follows_the_files(pictures: Path) -> None:
    before = open_source(str(pictures)).fingerprint()
    assert open_source(str(pictures)).fingerprint() == before
    draw_pictures(pictures, range(40, 41))
    more = open_source(str(pictures)).fingerprint()
    os.utime(pictures / "cat" / "000.png", ns=(1, 1))
    assert len({before, more, open_source(str(pictures)).fingerprint()}) == 3


def test_sources_travel(pictures: Path) -> None:
    for source in (Digits(), open_source(str(pictures))):
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint() == source.fingerprint()
        assert np.array_equal(np.asarray(copy.load(3)), np.asarray(source.load(3)))


def test_modes_become_grey_or_rgb(tmp_path: Path) -> None:
    def loaded(image: Image.Image, name: str, **how: object) -> Image.Image:
        image.save(tmp_path / name, **how)
        return load_image(tmp_path / name)

    deep = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert loaded(deep, "deep.png").getpixel((0, 0)) == 0x80
    steps = Image.fromarray(np.array([[0, 10_000], [10_001, 65_535]], np.uint16))
    assert list(loaded(steps, "steps.png", transparency=10_000).getdata()) == [0, 255, 39, 255]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert loaded(clear, "clear.png").getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert loaded(half, "half.png").getpixel((0, 0)) == 127
    palette = Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert loaded(palette, "palette.png").getpixel((0, 0)) == (10, 20, 30)
    assert loaded(Image.new("1", (4, 4), 1), "bit.png").getpixel((0, 0)) == 255
    assert loaded(Image.new("CMYK", (4, 4)), "print.jpg").mode == "RGB"
    sideways = Image.new("L", (6, 4))
    exif = sideways.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert loaded(sideways, "turned.jpg", exif=exif).size == (4, 6)


def recipe(image_size: int, channels: int) -> Recipe:
    return Recipe(image_size=image_size, channels=channels, held_out=0.5, shard_images=1)


@pytest.mark.parametrize("size", [(13, 7), (7, 13), (1, 9), (8, 8), (401, 100)])
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_sizes_are_cropped_and_resized(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    Image.new("RGB", size, (50, 100, 150)).save(tmp_path / "a.png")
    for target in (4, 8, 32):
        pixels = recipe(target, channels).pixels(open_source(str(tmp_path)).load(0))
        assert pixels.shape == (target, target, channels)
        # 0.299 R + 0.587 G + 0.114 B (ITU-R 601)
        expected = [50, 100, 150] if channels == 3 else [91]
        assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_shrinking_averages_areas_of_the_centre(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 12), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = recipe(4, 1).pixels(open_source(str(tmp_path)).load(0))[..., 0]
    expected = values[:, 2:10].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("resize", ["auto", "area", "lanczos"])
@pytest.mark.parametrize("size", [(12, 12), (12, 13), (13, 12), (12, 14), (12, 17), (31, 12)])
def test_what_has_the_size_is_cropped_and_not_resampled(resize: Any, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = Recipe(image_size=12, channels=3, held_out=0.5, shard_images=1, resize=resize)
    left, top = (width - 11) // 2, (height - 11) // 2
    expected = pixels[top : top + 12, left : left + 12]
    assert np.array_equal(made.pixels(Image.fromarray(pixels)), expected)


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: there is no .*/nowhere; give a folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.source: no image in "):
        open_source(str(tmp_path))
    for name in ("file", "a.png", "a.rar", "a.pkl"):
        (tmp_path / name).write_text("")
        refused(
            tmp_path / name, r"^data\.source: .* is not a folder, nor a file of a known kind; give a folder of images"
        )
    os.mkfifo(tmp_path / "a.zip")
    refused(tmp_path / "a.zip", r"^data\.source: .* is not a folder or a file; give a folder of images")
    refused(tmp_path / ("x" * 300), r"^data\.source: .*; give a folder of images, a file \(\.zip, \.tar, \.parquet")
    with pytest.raises(UserError, match=r"^data\.source: .*no_such_user.* cannot be read"):
        open_source("~no_such_user/images")


def test_unreadable_images_are_named_in_one_line(pictures: Path) -> None:
    whole = (pictures / "cat" / "000.png").read_bytes()
    bad = pictures / "bad.png"
    for data in (b"", b"not a picture", whole[: len(whole) // 2], whole[:40] + b"\0" * 40 + whole[80:]):
        bad.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.png: cannot be read as an image \(.+\); repair or remove it") as e:
            load_image(bad)
        assert "\n" not in str(e.value)
    Image.new("1", (10_000, 7_000)).save(bad)
    with pytest.raises(UserError, match=r"bad\.png: 10000 x 7000 is more than"):
        load_image(bad)
    # A format that is not allowed does not get in under another name.
    Image.new("L", (4, 4)).save(bad, "TIFF")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(bad)


def test_a_file_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(UserError, match="not valid UTF-8; rename it"):
        open_source(str(tmp_path))
