"""A spec's dataset: ingested into the store, or made before and used as it is."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.ingested import ingest_step, ingested
from pipelines.pipeline import run_sweep, run_training
from pipelines.progress import Progress
from pipelines.session import Session, open_session
from pipelines.spec import Spec, load_spec
from pipelines.steps import Done, Steps
from pipelines.store import Place
from tests.conftest import tiny_spec, write_spec


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Without Ray: nothing here needs it."""
    return open_session(Cluster(None), Progress(), None, storage=str(tmp_path / "store"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Digits in a folder that is no store's."""
    out = Place.of(tmp_path_factory.mktemp("made") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


def steps(session: Session) -> Steps:
    return Steps(session.store / "steps", session.progress)


def dataset_of(spec: Spec, session: Session) -> tuple[Dataset, Done]:
    return ingested(spec, session, steps(session))


def test_a_dataset_is_ingested_once_and_again_for_another_recipe(session: Session) -> None:
    dataset, done = dataset_of(tiny_spec(), session)
    assert not done.skipped
    assert dataset.place.path.parent == session.store.path / "datasets"
    again, done = dataset_of(tiny_spec(data__workers=1, data__window=2, data__flip=True), session)
    assert (again.place, done.skipped) == (dataset.place, True)
    places = {dataset.place}
    for change in ({"data__held_out": 0.3}, {"data__resize": "lanczos"}, {"data__drop_duplicates": True}):
        other, done = dataset_of(tiny_spec(**change), session)
        assert not done.skipped
        assert other.place not in places
        places.add(other.place)


def test_a_dataset_that_was_made_before_is_used_where_it_lies(made: Dataset, session: Session) -> None:
    spec = tiny_spec(data={"source": str(made.place), "image_size": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset, done = dataset_of(spec, session)
    assert (dataset.place, dataset.digest, done.skipped) == (made.place, made.digest, False)
    assert dataset_of(spec, session)[1].skipped
    assert (session.store / "datasets").list() == []


def test_what_does_not_fit_a_dataset_made_before_is_refused_or_said(made: Dataset, session: Session) -> None:
    source = str(made.place)
    with pytest.raises(UserError, match=r"^data\.image_size: 16, but the dataset .* has 8; set it so$"):
        ingest_step(tiny_spec(data={"source": source, "image_size": 16}), session)
    with pytest.raises(UserError, match=r"^data\.channels: 3, but the dataset .* has 1; set it so$"):
        ingest_step(tiny_spec(data={"source": source, "image_size": 8, "channels": 3}), session)
    for field, value in (("held_out", 0.3), ("resize", "area"), ("drop_duplicates", True), ("workers", 2)):
        with pytest.warns(UserWarning, match=rf"^data\.{field}: has no effect, for .* was made before$"):
            ingest_step(tiny_spec(data={"source": source, "image_size": 8, field: value}), session)
    (made.place.path.parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no image in"):
        ingest_step(tiny_spec(data={"source": str(made.place.path.parent / "empty"), "image_size": 8}), session)


def test_a_cache_for_shards_on_this_host_is_said_to_be_of_no_use(session: Session, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^data\.cache: has no effect, for the shards lie on this host"):
        dataset_of(tiny_spec(data__cache={"folder": str(tmp_path)}), session)


def test_a_share_beside_a_split_of_the_source_is_said_to_be_of_no_use(session: Session, tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "pictures" / ("train", "test")[number % 3 == 0] / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number * 20, np.uint8)).save(folder / f"{number}.png")
    data = {"source": str(tmp_path / "pictures"), "image_size": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset, _ = dataset_of(tiny_spec(data=data), session)
    assert (len(dataset.split("train")), len(dataset.split("held-out"))) == (8, 4)
    with pytest.warns(UserWarning, match=r"^data\.held_out: has no effect, for .* has a split of its own$"):
        dataset_of(tiny_spec(data={**data, "held_out": 0.4}), session)


def test_nothing_held_out_is_trained_on_but_not_ranked(session: Session) -> None:
    fields = {"data__held_out": 0.0, "sweep": {"parameters": {"seed": [1, 2]}}}
    dataset, _ = dataset_of(tiny_spec(**fields), session)
    assert (len(dataset.split("train")), len(dataset.split("held-out"))) == (1797, 0)
    with pytest.raises(UserError, match=r"data\.held_out: fewer than 4 images are held out"):
        run_sweep(tiny_spec(**fields), session)


def test_paths_are_absolute_and_addresses_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path / "spec.yaml", data__source="s3://bucket/set", data__cache={"folder": "cache"})
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.data.source == "s3://bucket/set"
    assert spec.data.cache is not None
    assert spec.data.cache.folder == str(tmp_path / "cache")
    write_spec(tmp_path / "spec.yaml", data__source="pictures")
    assert load_spec(tmp_path / "spec.yaml").data.source == str(tmp_path / "pictures")


def test_a_run_skips_damage_and_says_so(cluster: Cluster, made: Dataset, tmp_path: Path) -> None:
    """Through Ray Train, two ranks of which meet the same lost shard."""
    shutil.copytree(made.place.path, tmp_path / "data")
    lost = made.split("train").shards[2].name
    (tmp_path / "data" / lost).unlink()

    class Listener(Progress):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    listener = Listener()
    data = {"source": str(tmp_path / "data"), "image_size": 8, "on_error": "skip"}
    spec = tiny_spec(data=data, train__images=1280, train__workers=2, train__oversubscribe=True)
    session = open_session(cluster, listener, spec, storage=str(tmp_path / "store"))
    done = run_training(spec, session)
    assert done["damaged"] == 100
    (warning,) = [line for line in listener.said if "damaged" in line]
    assert f"100 damaged training images of run {done['run']} had others read in their place" in warning
    assert f"row 0 of {lost} for one" in warning
