"""One Ray for the whole test run, and a spec small enough to train in seconds."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipelines.cluster import Cluster
from pipelines.progress import Progress
from pipelines.session import Session, open_session
from pipelines.spec import Spec, parse_spec

if TYPE_CHECKING:
    from tests.s3_faults import FaultyProxy


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes run the tests, one has all that need Ray, and begins with them: they take longest."""
    on_ray = {item for item in items if "cluster" in getattr(item, "fixturenames", ())}
    for item in on_ray:
        item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item not in on_ray)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A shell's background job, which the tests may be, ignores SIGINT, and so would the processes that it starts."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A local Ray, started as the product starts it."""
    with Cluster(None, for_tune=True) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture(scope="session")
def ray_address(cluster: Cluster) -> str:
    """Where another process can join it (the token is in the environment)."""
    return cluster.connect().get_runtime_context().gcs_address


def tiny_fields(**overrides: Any) -> dict[str, Any]:
    """Fields of a spec on the bundled digits that trains in a few seconds."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "data": {"source": "digits", "image_size": 8, "held_out": 0.4, "shard_images": 100},
        "model": {"channels": [16, 16], "blocks": 1, "groups": 8},
        "diffusion": {"timesteps": 50, "schedule": {"kind": "cosine"}},
        "train": {
            "images": 640,
            "global_batch": 32,
            "slots": 4,
            "checkpoint_every": 5,
            "log_every": 2,
            "learning_rate": 0.002,
        },
        "sample": {"n": 30, "steps": 5, "chunk": 16, "workers": 2},
        "evaluate": {"feature_epochs": 3, "bits_images": 32, "bits_timesteps": 4},
        "promote": {"frechet_over_floor": 1000.0, "feature_accuracy": 0.1},
    }
    for name, value in overrides.items():
        section, _, field = name.partition("__")
        if field:
            fields[section] = {**fields.get(section, {}), field: value}
        else:
            fields[section] = value
    return fields


def tiny_spec(**overrides: Any) -> Spec:
    return parse_spec(tiny_fields(**overrides))


def write_spec(path: Path, **overrides: Any) -> Path:
    path.write_text(yaml.safe_dump(tiny_fields(**overrides)))
    return path


@pytest.fixture
def session(cluster: Cluster, tmp_path: Path) -> Session:
    """A session on a store of its own."""
    return open_session(cluster, Progress(), tiny_spec(), storage=str(tmp_path / "store"))


# S3, for the modules that ask for it: the others do not wait for its server to be loaded.


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server of the module's own."""
    from tests.s3_faults import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def shared_proxy(server: int) -> "Iterator[FaultyProxy]":
    from tests.s3_faults import faulty_proxy

    with faulty_proxy(server) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: "FaultyProxy", monkeypatch: pytest.MonkeyPatch) -> "FaultyProxy":
    """Before the server, and calm; the environment names it as the endpoint."""
    from tests.s3_faults import set_environment

    shared_proxy.calm()
    set_environment(monkeypatch, shared_proxy.endpoint)
    return shared_proxy


@pytest.fixture
def stock(server: int) -> Any:
    """Amazon's own client."""
    from tests.s3_faults import stock_client

    return stock_client(server)
