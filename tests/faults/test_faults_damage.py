"""Each file of a checkpoint truncated, or a bit of it flipped: named, passed over, and the run goes on from the one
before.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.store import MANIFEST
from pipelines.train.checkpoint import EMA, MODEL, OPTIMIZER, STATE
from tests.faults.command import EVERY, Command, command
from tests.faults.evidence import assert_same_bits

FILES = (MODEL, EMA, OPTIMIZER, STATE, MANIFEST)


@pytest.fixture
def ended(undisturbed: Command, tmp_path: Path) -> Iterator[Command]:
    """The undisturbed run in a store of its own, with a tracker that has not heard of it."""
    shutil.copytree(undisturbed.store, tmp_path / "store")
    (tmp_path / "store" / "mlflow.db").unlink()
    with command(undisturbed.spec, tmp_path / "store") as copy:
        yield copy


def truncated(data: bytes, moments: random.Random) -> bytes:
    return data[: moments.randrange(len(data))]


def flipped(data: bytes, moments: random.Random) -> bytes:
    # Not in the manifest's format: one that is not known is refused, be it a later version's or damage.
    known = data.find(b'"format": ') + len(b'"format": ')
    at = moments.choice([at for at in range(len(data)) if at != known])
    return data[:at] + bytes([data[at] ^ (1 << moments.randrange(8))]) + data[at + 1 :]


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", [truncated, flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_bits(
    name: str, how: object, undisturbed: Command, ended: Command, moments: random.Random
) -> None:
    last = ended.kept()
    file = ended.run.checkpoints.at(last).path / name
    file.write_bytes(how(file.read_bytes(), moments))
    ended.start()
    said = ended.finish().said
    assert f"checkpoint {last} is damaged and passed over: {file.parent}" in said
    before = last - (last % EVERY or EVERY)
    assert f"goes on from step {before:,}\n" in said
    again = [row for row in ended.run.place.path.joinpath("journal").iterdir() if row.name.endswith("-0002.jsonl")]
    assert len(again) == 1, "no more was made again than the damaged one held"
    assert_same_bits(undisturbed, ended)
