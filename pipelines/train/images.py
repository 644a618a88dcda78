"""The images that a run is trained on: read as its spec says, with a record of those that were damaged."""

import numpy as np

from pipelines.data.damage import Damage
from pipelines.data.manifest import Dataset
from pipelines.data.order import Ints, slot_positions
from pipelines.data.reader import SHARDS_OPEN, Pixels, Reader, ShardCache, SlotStream
from pipelines.spec import Spec
from pipelines.train.run import Run


class TrainingImages:
    """Those of the slots that one rank owns."""

    def __init__(self, spec: Spec, dataset: Dataset, run: Run, owned: range) -> None:
        self._train, self._run, self._owned = spec.train, run, owned
        self._split, cache = dataset.split("train"), spec.data.cache
        self._order = self._split.order(spec.data.window, spec.seed)
        self._met: dict[tuple[str, int], Damage] = {}
        self._reader = Reader(
            self._split,
            shard_cache=None if cache is None else ShardCache(cache.folder, int(cache.gib * 2**30)),
            on_error=spec.data.on_error,
            on_damage=self._meet,
            shards_open=max(SHARDS_OPEN, 2 * spec.data.window + 2),  # the window, the next one, and where they meet
        )

    def stream(self, step: int) -> SlotStream:
        """The slots from a step on, to the end of the run."""
        return SlotStream(
            self._reader,
            self._order,
            global_batch=self._train.global_batch,
            slots=self._train.slots,
            owned=self._owned,
            start_step=step,
            end_step=self._train.total_steps,
        )

    def read(self, step: int, slot: int) -> tuple[Pixels, Ints, list[str]]:
        """The images and labels of a slot once more, and their names: shard and row."""
        shards, rows = self._order.locate(slot_positions(step, slot, self._train.slots, self._train.global_batch))
        at = zip(shards.tolist(), rows.tolist(), strict=True)
        return *self._reader.read(shards, rows), [f"{self._split.shard(shard).name} row {row}" for shard, row in at]

    def record_damage(self, step: int) -> None:
        """Keep what was damaged of a step's images. Reading ahead meets more, which the run may never come to."""
        if not self._met:
            return
        positions = [slot_positions(step, slot, self._train.slots, self._train.global_batch) for slot in self._owned]
        shards, rows = self._order.locate(np.concatenate(positions))
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            if (damage := self._met.pop((self._split.shard(shard).name, row), None)) is not None:
                self._run.record_damage(damage)

    def _meet(self, damage: Damage) -> None:
        self._met[damage.shard, damage.row] = damage
