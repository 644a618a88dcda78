"""Moments drawn at random, from a seed that is said and can be given, and a run that nobody disturbs."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.command import Command, command, write_spec
from tests.faults.disk import small_disk

SEED = "FAULTS_SEED"
STEPS = 400

Tell = Callable[[str], None]


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Tell:
    """Say a line at once, whatever pytest does with the rest."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="", flush=True)

    return say


@pytest.fixture(scope="session")
def faults_seed(tell: Tell) -> int:
    """Of all moments: $FAULTS_SEED, or another one each time."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
    tell(f"{SEED}={seed} draws these moments again")
    return seed


@pytest.fixture
def moments(faults_seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Drawn for this test alone, so that it can be run again by itself."""
    return random.Random(f"{faults_seed} {request.node.name}")


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all of these runs train."""
    return write_spec(tmp_path_factory.mktemp("spec") / "spec.yaml", STEPS)


@pytest.fixture(scope="session")
def undisturbed(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A run of one worker from begin to end."""
    with command(spec, tmp_path_factory.mktemp("undisturbed") / "store") as whole:
        whole.start()
        assert whole.finish().result["attempts"] == 1
        assert len(whole.family()) > 1, "nothing of what it started was seen, and so nothing proves that it is gone"
        yield whole


@pytest.fixture
def disturbed(spec: Path, tmp_path: Path) -> Iterator[Command]:
    """The same in another store, not begun yet."""
    with command(spec, tmp_path / "store") as given:
        yield given


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    with small_disk(tmp_path / "small") as folder:
        yield folder
