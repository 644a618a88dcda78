"""`ddpm sample`, `evaluate` and `compare` as a person types them: what works, and one line for each mistake."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import app
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.store import Place
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.jobs.test_cli import assert_refused, ddpm
from tests.train.train_helpers import trained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("cli") / "store" / "datasets" / "digits"
    return ingest("digits", Place.of(place), image_size=8, channels=1, held_out=0.4, shard_images=500)


@pytest.fixture(scope="module")
def run(dataset: Dataset) -> Run:
    spec = tiny_spec(model__classes=10, train__label_dropout=0.1, evaluate__samples=40)
    return trained(spec, dataset, dataset.place.path.parents[1])


def told(*words: str, cwd: Path) -> dict[str, object]:
    done = ddpm(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_job_its_forms_one_of_its_images_and_its_scores(
    run: Run, dataset: Dataset, tmp_path: Path, ray_address: str
) -> None:
    model, store = str(run.place), ("--storage", str(dataset.place.path.parents[1]), "--ray", ray_address)
    words = ("sample", model, "--n", "20", "--seed", "5", "--labels", "3,5", *store)
    bulk = told(*words, "--out", "out", "--format", "npz", "--format", "png", "--trajectory", cwd=tmp_path)
    assert (bulk["n"], bulk["made"]) == (20, 20)
    with np.load(str(bulk["files"]["npz"])) as arrays:  # type: ignore[index]
        assert arrays["arr_1"].tolist() == [3, 5] * 10
    assert (tmp_path / "out" / "trajectory.png").exists()

    words = ("sample", model, "--images", "17", "--seed", "5", "--labels", "3,5", *store, "--out", "one", "--json")
    done = ddpm(*words, "--n", "9", "--format", "png", cwd=tmp_path)
    again = json.loads(done.stdout.splitlines()[-1])
    for option in ("--n", "--format"):
        assert f"{option}: has no effect with --images" in done.stderr
    one = (tmp_path / "one" / "images" / "000000017.png").read_bytes()
    assert one == (tmp_path / "out" / "images" / "000000017.png").read_bytes()
    assert again["n"] == 1

    scores = told("evaluate", "out", "--against", str(dataset.place), *store, cwd=tmp_path)
    names = [score["name"] for score in scores["scores"]]  # type: ignore[attr-defined]
    assert "class_agreement" in names
    assert "bits_per_dim" not in names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "MODEL", "--out", "out", "--set", "sample.steps=51"], "sample.steps: 51 is more than"),
        (["sample", "MODEL", "--out", "out", "--labels", "3,10"], "10 is no class of the model, which has 10"),
        (["sample", "MODEL", "--out", "out", "--labels", "cats"], "whole numbers between commas"),
        (["sample", "MODEL", "--out", "out", "--labels", "data"], "--data"),
        (["sample", "MODEL", "--out", "out", "--format", "gif"], "--format gif"),
        (["sample", "MODEL", "--out", "out", "--images", "-1"], "--images -1"),
        (["sample", "MODEL", "--out", "out", "--set", "sample.n=3"], "sample.n is said by --n"),
        (["sample", "MODEL", "--out", "out", "--set", "sample={seed: 3}"], "sample.seed is said by --seed"),
        (
            ["sample", "MODEL", "--out", "out", "--set", "sample.resources={CPU: 1}"],
            "resources: CPU is said by sample.threads",
        ),
        (["sample", "MODEL", "--out", "out", "--set", "sample.resources={GPU: 2}"], "a process draws on one GPU"),
        (["sample", "MODEL", "--out", "out", "--set", "sample.resources={bundle: 1}"], "bundle is Ray's own"),
        (["sample", "nobody@champion", "--out", "out"], "no tracking database"),
        (["evaluate", "MODEL", "--against", "SMALL"], "images of 16 pixels"),
        (["evaluate", "MODEL", "--against", "nowhere"], "nowhere"),
        (["evaluate", "MODEL", "--against", "DATASET", "--grid", "stps=3"], "did you mean steps"),
        (
            ["evaluate", "MODEL", "--against", "DATASET", "--set", "evaluate.inception=none.pth"],
            "none.pth cannot be read",
        ),
        (["evaluate", "DATASET", "--against", "SMALL"], "image_size 8"),
        (["evaluate", "DATASET", "--against", "DATASET", "--set", "sample.steps=3"], "only fields of evaluate"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes(
    run: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    small = tmp_path / "small"
    if "SMALL" in words:
        ingest("digits", Place.of(small), image_size=16, channels=1, held_out=0.4, shard_images=2000)
    names = {"MODEL": str(run.place), "DATASET": str(dataset.place), "SMALL": str(small)}
    monkeypatch.chdir(tmp_path)
    command = [*(names.get(word, word) for word in words), "--storage", str(dataset.place.path.parents[1])]
    with pytest.raises(UserError, match=re.escape(said)):
        app(command, standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_options_of_evaluation_without_effect_are_named(
    run: Run,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command ends with the size of the images, before anything is drawn."""
    ingest("digits", Place.of(tmp_path / "small"), image_size=16, channels=1, held_out=0.4, shard_images=2000)
    monkeypatch.chdir(tmp_path)
    for words, said in (
        ([str(dataset.place), "--exact"], ["evaluate.exact: has no effect on images that are there"]),
        (
            [str(dataset.place), "--set", "evaluate.keep_samples=false", "--set", "evaluate.bits_images=9"],
            [f"evaluate.{name}: has no effect on images" for name in ("keep_samples", "bits_images")],
        ),
        (
            [str(dataset.place), "--set", "evaluate.inception=none", "--set", "evaluate.feature_width=9"],
            ["evaluate.feature_width: has no effect with evaluate.inception"],
        ),
        (
            [str(run.place), "--grid", "steps=3", "--exact", "--set", "sample.steps=4"],
            ["evaluate.exact: has no effect on --grid", "sample.steps: has no effect on --grid, which varies it"],
        ),
    ):
        store = ["--storage", str(dataset.place.path.parents[1])]
        with pytest.raises(UserError, match="16"):
            app(["evaluate", *words, "--against", "small", *store], standalone_mode=False)
        told = capsys.readouterr().err
        assert all(part in told for part in said), told


def test_no_images_are_none_to_ask_for(run: Run, tmp_path: Path) -> None:
    assert_refused(ddpm("sample", str(run.place), "--out", "out", "--n", "0", cwd=tmp_path), "--n")


def test_a_damaged_checkpoint_is_named(run: Run, dataset: Dataset, tmp_path: Path) -> None:
    spec = tiny_spec(train__images=64, seed=8)
    other = trained(spec, dataset, tmp_path / "store")
    file = other.checkpoints.at(2).path / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = ddpm("sample", str(other.checkpoints.at(2)), "--out", "out", cwd=tmp_path)
    assert_refused(done, str(file))
