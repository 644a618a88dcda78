"""What a run leaves behind as it trains: journal, checkpoints, a picture of the moment for the driver.

Checkpoints are committed by a thread, from copies, while training goes on. Where the storage fails, training goes on
too: the older checkpoint stays whole, the driver is told, and the next one carries the rows of the journal that could
not be written.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipelines.errors import Failed, one_line
from pipelines.files import StorageError
from pipelines.sections import Train
from pipelines.train.checkpoint import Checkpoint
from pipelines.train.end import kept_for_scores
from pipelines.train.journal import Row
from pipelines.train.reduce import tree_sum
from pipelines.train.run import Run
from pipelines.train.scores import HeldOutScore
from pipelines.train.slots import QUARTILES
from pipelines.train.usage import Usage
from pipelines.train.world import World

Figures = Mapping[str, float]

_Snapshot = tuple[int, Mapping[float, Mapping[str, Tensor]]]  # of a step, by sigma_rel

_LIVE_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0
"""For a checkpoint that is being written when the next is due: well below that of ranks with each other."""
_LAST_ATTEMPTS = 6
_LAST_PAUSE_SECONDS = 0.5  # then twice as long each time: some 16 s in all


class Recorder:
    """Of one rank of one attempt. Only rank 0 writes; all of them take part in `log`."""

    def __init__(self, run: Run, train: Train, attempt: int, images: int, world: World) -> None:
        """`images` were seen before."""
        self._run, self._train, self._attempt, self._world = run, train, attempt, world
        self._pending: list[tuple[Tensor, Figures, int, Figures]] = []
        self._rows: list[Row] = []
        self._writer = _Writer(run, attempt, train)
        self._usage = None if world.rank else Usage()
        self._newest: Row | None = None
        self._step = images // train.global_batch
        self._live_at = 0.0
        self._mark = (time.perf_counter(), images)

    def add(self, statistics: Tensor, exact: Figures, wall: Figures) -> None:
        """A step's figures. `statistics` are this rank's, float64 [owned slots, 1 + 2 * QUARTILES]: of each slot the
        loss, then by quartile of the log-SNR the sums of losses and of what they count.
        """
        self._pending.append((statistics, exact, time.time_ns() // 1_000_000, wall))

    def log(self, step: int) -> None:
        """Turn the figures up to this step into rows of the journal: every rank's slots, in slot order."""
        if not self._pending:
            return
        mine = torch.stack([statistics for statistics, *_ in self._pending])  # [steps, owned slots, statistics]
        totals = tree_sum(torch.cat(self._world.gather_tensors(mine), dim=1).transpose(0, 1)) / self._train.slots
        batch, first = self._train.global_batch, step - len(self._pending) + 1
        now, (then, images_then) = time.perf_counter(), self._mark
        rate = (step * batch - images_then) / (now - then)
        self._mark = (now, step * batch)
        common = {"images_per_second": rate, **(self._usage.process() if self._usage else {})}
        of_host = self._usage.host() if self._usage else {}
        for i, (_, exact, at, wall) in enumerate(self._pending):
            sums, counts = totals[i, 1:].view(2, QUARTILES)
            by_quartile = {
                f"loss_log_snr_q{q + 1}": float(sums[q] / counts[q]) for q in range(QUARTILES) if counts[q] > 0
            }
            figures = {"loss": float(totals[i, 0]), **by_quartile, **exact}
            row = Row(
                step=first + i,
                images=(first + i) * batch,
                time_ms=at,
                exact={name: value for name, value in figures.items() if math.isfinite(value)},
                wall={**common, **wall, **(of_host if i == len(self._pending) - 1 else {})},
            )
            self._rows.append(row)
        self._pending.clear()
        self._newest = self._rows[-1]
        self.beat(step)

    def save(self, step: int, checkpoint: Callable[[], Checkpoint]) -> None:
        """Commit the journal up to this step, then the checkpoint, while training goes on; on rank 0 alone is it asked
        for. RuntimeError where a later attempt drives the run.
        """
        self.log(step)
        if self._world.rank == 0:
            self._writer.write(checkpoint(), self._rows)
        self._rows = []

    def save_snapshot(self, step: int, profiles: Callable[[], Mapping[float, Mapping[str, Tensor]]]) -> None:
        """Keep the power-function averages of this step while training goes on; the next checkpoint counts on them."""
        if self._world.rank == 0:
            self._writer.keep_snapshot(step, profiles())

    def save_score(self, score: HeldOutScore, grid: bytes) -> None:
        """Keep a score, after the checkpoint that it is of; where the storage fails, with the next one."""
        self._writer.write_score(score, grid)

    def settle(self) -> None:
        """Wait until what was to be saved is. What the storage did not take is left for the next checkpoint."""
        self._writer.wait()

    def finish(self) -> None:
        """As `settle`, for the last checkpoint: it is tried a few times. Failed where the storage does not take it."""
        self._writer.finish()

    def beat(self, step: int) -> None:
        """A step was taken, of which there are no figures yet."""
        self._step = step
        self.show()

    def show(self, always: bool = False) -> None:
        """Tell the driver how far we are, now and then or `always`; a picture of the moment, not a record."""
        if self._world.rank or not (always or time.monotonic() - self._live_at > _LIVE_SECONDS):
            return
        self._live_at = time.monotonic()
        newest = self._newest
        live = {
            "attempt": self._attempt,
            "workers": self._world.size,
            "idle": self._world.idle,
            "images": self._step * self._train.global_batch,
            "images_per_second": None if newest is None else newest.wall["images_per_second"],
            "loss": None if newest is None else newest.exact.get("loss"),
            "skipped": 0 if newest is None else newest.exact["skipped"],
            "trouble": self._writer.trouble,
        }
        with contextlib.suppress(OSError, StorageError):
            shown = self._run.live()
            if shown is None or shown["attempt"] <= self._attempt:  # else a later attempt drives the run
                self._run.show(live)


class _Writer:
    """Commits snapshots and one checkpoint at a time, in a thread of its own."""

    def __init__(self, run: Run, attempt: int, train: Train) -> None:
        self._run, self._attempt, self._train = run, attempt, train
        self._changing = threading.Lock()
        self._snapshots: list[_Snapshot] = []
        self._left: list[tuple[Checkpoint, list[Row]]] = []
        """What is being written, or could not be; and so the snapshots, which come before it."""
        self._scored = frozenset(train.scored_steps(train.total_steps))
        self._busy = False
        self._thread: threading.Thread | None = None
        self.scores: list[tuple[HeldOutScore, bytes]] = []
        """Held-out scores that are to be written, with their pictures."""
        self._error: BaseException | None = None
        self.trouble: str | None = None
        """What the storage says, where it does not take what it is given."""

    def write(self, checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
        """Each is waited for in turn, but not for long, for then other ranks would wait for this one: where the storage
        does not take it, the newest takes the place of the one that is tried still, unless that one is to be scored.
        """
        if self.trouble is None or self._error is not None:
            self._wait_a_little()
        with self._changing:
            unwritten: list[Row] = []
            if self._left and self._left[-1][0].step not in self._scored:
                unwritten = self._left.pop()[1]
            self._left.append((checkpoint, [*unwritten, *rows]))
        self._start()

    def keep_snapshot(self, step: int, profiles: Mapping[float, Mapping[str, Tensor]]) -> None:
        with self._changing:
            self._snapshots.append((step, profiles))
        self._start()

    def _start(self) -> None:
        with self._changing:
            if self._busy:
                return
            self._busy = True
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()

    def write_score(self, score: HeldOutScore, grid: bytes) -> None:
        with self._changing:
            self.scores.append((score, grid))
        self._start()

    def _wait_a_little(self) -> None:
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
            if self._thread.is_alive() and self._left:
                step = self._left[0][0].step
                self.trouble = f"checkpoint {step} is not written after {_PATIENCE_SECONDS:g} s (the storage is slow)"
                return
        self.wait()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        self.wait()
        pause = _LAST_PAUSE_SECONDS
        for _ in range(_LAST_ATTEMPTS - 1):
            if not self._left and not self.scores:
                return
            time.sleep(pause)
            pause *= 2
            self._start()
            self.wait()
        if self._left or self.scores:
            raise Failed(
                f"run {self._run.name}: {self.trouble}; mend that and run it again, it goes on from what it has"
            )

    def _work(self) -> None:
        more = True
        while more:
            with self._changing:
                snapshots, left, scores = tuple(self._snapshots), tuple(self._left), tuple(self.scores)
            taken = self._commit(snapshots, left, scores)
            with self._changing:
                # What came meanwhile is tried at once; what the storage did not take waits for the next checkpoint.
                came = len(self._snapshots) > len(snapshots) or len(self.scores) > len(scores)
                came = came or [id(one) for one in self._left] != [id(one) for one in left]
                self._busy = more = came and self._error is None
                if taken:
                    del self._snapshots[: len(snapshots)], self.scores[: len(scores)]
                    self._left = [one for one in self._left if not any(one is other for other in left)]

    def _commit(
        self,
        snapshots: Sequence[_Snapshot],
        left: Sequence[tuple[Checkpoint, list[Row]]],
        scores: Sequence[tuple[HeldOutScore, bytes]],
    ) -> bool:
        """Write what there is, in its order: a checkpoint counts on the snapshots before it, and a step's score is told
        of no checkpoint that is not there. Whether the storage took it."""
        doing = f"checkpoint {left[0][0].step}" if left else "what is new"
        try:
            check_newest(self._run, self._attempt)
            for step, profiles in snapshots:
                doing = f"snapshot {step}"
                self._run.checkpoints.save_snapshot(step, profiles)
            for checkpoint, rows in left:
                doing = f"checkpoint {checkpoint.step}"
                self._run.journal.commit(self._attempt, rows)
                also = kept_for_scores(self._run, self._train)
                self._run.checkpoints.save(
                    checkpoint,
                    self._train.keep_checkpoints,
                    self._train.keep_every,
                    also,
                    check=lambda: check_newest(self._run, self._attempt),
                )
            for score, grid in scores:
                doing = f"the score of step {score.step}"
                self._run.scores.commit(score, grid)
        except (OSError, StorageError) as error:
            self.trouble = f"{doing} could not be written ({one_line(error)})"
            return False
        except BaseException as error:  # raised where it is waited for
            self._error = error
            return False
        self.trouble = None
        return True


def check_newest(run: Run, attempt: int) -> None:
    """RuntimeError where a later attempt drives the run: what an earlier one still writes would be a zombie's."""
    if run.newest_attempt() > attempt:
        raise RuntimeError(f"attempt {attempt} of run {run.name} was superseded: it writes no more")
