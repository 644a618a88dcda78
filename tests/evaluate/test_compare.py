"""What is said of two evaluations, and of many ways to draw from one model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.errors import UserError
from pipelines.evaluate.answers import Evaluation
from pipelines.evaluate.compare import compare, keep_pictures
from pipelines.evaluate.scores import Score
from pipelines.evaluate.study import Study, Way, parse_grid, picture, study
from pipelines.fields import apply_overrides
from pipelines.models import Model
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.spec import parse_spec
from pipelines.store import Place
from tests.conftest import tiny_fields, tiny_spec
from tests.sample.conftest import NoCluster, Said, untrained


def score(name: str, value: float, low: float, high: float, **provenance: object) -> Score:
    of_all = {"n": 100, "features_digest": "f", "preprocessing": "p", "split": "held-out", "dataset_digest": "d"}
    return Score(name, value, (low, high), {**of_all, "neighbours": 3, "floor": 0.5, **provenance})


def evaluation(*scores: Score) -> Evaluation:
    return Evaluation(list(scores), {}, "", "")


def test_a_verdict_needs_intervals_that_do_not_meet_and_knows_which_way_is_better() -> None:
    a = evaluation(score("frechet", 1.0, 0.8, 1.2), score("recall", 0.5, 0.4, 0.6), score("kid", 0.1, 0.0, 0.2))
    b = evaluation(score("frechet", 2.0, 1.3, 2.5), score("recall", 0.8, 0.7, 0.9), score("kid", 0.2, 0.1, 0.3))
    assert {one.name: one.verdict for one in compare(a, b)} == {
        "frechet": "first",
        "recall": "second",
        "kid": "cannot tell",
    }
    assert {one.name: one.verdict for one in compare(b, a)} == {
        "frechet": "second",
        "recall": "first",
        "kid": "cannot tell",
    }


def test_what_differs_where_it_matters_is_named_and_refused_where_nothing_is_left() -> None:
    a = evaluation(score("frechet", 1.0, 0.8, 1.2), score("recall", 0.5, 0.4, 0.6))
    other_k = evaluation(score("frechet", 9.0, 8.0, 9.5), score("recall", 0.5, 0.4, 0.6, neighbours=5))
    found = {one.name: one for one in compare(a, other_k)}
    assert found["frechet"].verdict == "first"
    assert found["recall"].verdict == "not comparable"
    assert found["recall"].differs == {"neighbours": (3, 5)}
    others = evaluation(score("frechet", 1.0, 0.8, 1.2, n=50, features_digest="g"), score("recall", 1, 1, 1, n=50))
    with pytest.raises(UserError, match=r"differ in features_digest, n$"):
        compare(a, others)


def test_why_there_is_no_picture_is_said_and_where_seeds_differ(tmp_path: Path) -> None:
    ours = evaluation(score("frechet", 1.0, 0.8, 1.2, sample_seed=0), score("kid", 1.0, 0.8, 1.2))
    theirs = evaluation(score("frechet", 1.0, 0.8, 1.2, sample_seed=3))
    gone = replace(ours, images=str(tmp_path / "gone"))
    for both, said in (
        ((ours, ours), ["were not kept"]),
        ((gone, gone), [f"no picture of both: {tmp_path / 'gone'}"]),
        ((ours, theirs), ["not drawn from the same seeds (0 and 3)", "were not kept"]),
        ((ours, evaluation(score("frechet", 1.0, 0.8, 1.2))), ["seeds (0 and not recorded)", "were not kept"]),
    ):
        progress = Said()
        assert keep_pictures(both, Place.of(tmp_path / "store"), progress) is None
        assert len(progress.lines) == len(said)
        assert all(part in line for part, line in zip(said, progress.lines, strict=True))


def test_pictures_lie_one_above_the_other(tmp_path: Path) -> None:
    places = []
    for name, grey in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        pixels = np.full((40, 8, 8), grey, np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None]
        np.save(tmp_path / name / "images.npy", pixels)
        source, out = str(tmp_path / name / "images.npy"), Place.of(tmp_path / name / "out")
        places.append(ingest(source, out, image_size=8, channels=1, held_out=0.0, shard_images=7).place)
    both = [Evaluation([], {}, "", str(place)) for place in places]
    shown = np.asarray(Image.open(str(keep_pictures(both, Place.of(tmp_path / "store"), Progress()))))
    half = shown.shape[0] // 2
    assert shown[: half - 4].max() < 100 < shown[half + 8, 8]


def test_a_grid_is_all_combinations_in_the_order_that_they_are_said() -> None:
    assert parse_grid(["steps=10,20", "sampler=ddim,ancestral"]) == [
        {"steps": 10, "sampler": "ddim"},
        {"steps": 10, "sampler": "ancestral"},
        {"steps": 20, "sampler": "ddim"},
        {"steps": 20, "sampler": "ancestral"},
    ]
    assert parse_grid(["ema=live,0.05,null"]) == [{"ema_length": "live"}, {"ema_length": 0.05}, {"ema_length": None}]
    for words, said in (
        (["step=10"], "did you mean steps"),
        (["workers=1,2"], "may be"),
        (["steps"], "write it as"),
        (["steps=1", "steps=2"], "there twice"),
        (["steps=1,,2"], "each value once"),
        (["steps=2,2"], "each value once"),
        (["spacing=[a,b"], "not valid YAML"),
        (["seed=1,2"], "may be"),
    ):
        with pytest.raises(UserError, match=said):
            parse_grid(words)


def way(calls: int, value: float, high: float, **setting: object) -> Way:
    return Way(setting, calls, score("frechet", value, value * 0.9, high))


def test_the_cheapest_is_the_one_with_fewest_calls_inside_the_bests_interval() -> None:
    ways = [
        way(10, 2.0, 2.2, steps=10, sampler="ddim"),
        way(20, 1.14, 1.3, steps=20, sampler="ddim"),
        way(50, 1.0, 1.15, steps=50, sampler="ddim"),
        way(20, 1.12, 1.3, steps=20, sampler="ancestral"),
    ]
    found = Study(ways, "")
    assert found.best is ways[2]
    assert found.cheapest is ways[3]
    assert picture(found).startswith(b"\x89PNG")


def test_a_study_draws_every_way_from_the_same_seeds(cluster: Cluster, tmp_path: Path) -> None:
    dataset = ingest("digits", Place.of(tmp_path / "data"), image_size=8, channels=1, held_out=0.4, shard_images=1000)
    fields = tiny_fields(evaluate__samples=40, evaluate__feature_epochs=2)
    base = untrained()
    session = open_session(cluster, Progress(), tiny_spec(), storage=str(tmp_path / "store"))

    def model_of(words: Sequence[str]) -> Model:
        return Model(parse_spec(apply_overrides(fields, words)), base.weights, "no-data", "test", "none")

    found = study(parse_grid(["steps=2", "sampler=ddim,ancestral"]), model_of, dataset, session)
    assert [one.calls for one in found.ways] == [2, 2]
    assert {one.score.provenance["sample_seed"] for one in found.ways} == {0}
    assert len({one.score.value for one in found.ways}) == 2
    assert Image.open(found.picture).width > 400
    nobody = open_session(NoCluster(), Progress(), tiny_spec(), storage=str(tmp_path / "store"))
    again = study(parse_grid(["steps=2", "sampler=ddim,ancestral"]), model_of, dataset, nobody)
    assert again.to_json() == found.to_json()
