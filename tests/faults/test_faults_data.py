"""Damage that one rank alone meets ends the run by its name, and not by a time-out of the others."""

from pathlib import Path

import pytest

from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.errors import Failed
from pipelines.progress import Progress
from pipelines.session import open_session
from pipelines.store import Place
from pipelines.train.driver import train
from tests.conftest import tiny_spec


@pytest.mark.faults
def test_a_damaged_image_of_one_rank_is_named_by_the_driver(cluster: Cluster, tmp_path: Path) -> None:
    dataset = ingest("digits", Place.of(tmp_path / "d"), image_size=8, channels=1, held_out=0.4, shard_images=100)
    shard = dataset.place.path / dataset.split("train").shard(3).name
    shard.write_bytes(bytes(shard.stat().st_size))
    spec = tiny_spec(train__workers=2, train__images=12_800, train__oversubscribe=True)
    session = open_session(cluster, Progress(), spec, storage=str(tmp_path / "store"))
    with pytest.raises(Failed, match=r"train-000003\.tar.* does not match the sha256 in the index"):
        train(spec, dataset, session.store, session.cluster, session.tracker, session.progress)
    attempts = (session.store / "runs").list()
    assert len((session.store / "runs" / attempts[0] / "attempts").list()) == 1, "nobody tries it again"
