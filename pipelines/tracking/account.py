"""A run's account with a tracker: what it owes, and the sending of it.

Whoever is killed between a request and the note of it leaves the rows in doubt; the next one asks the tracker which of
them it has. What is sent twice nevertheless is the same bytes, which MLflow keeps once.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.errors import Failed, one_line
from pipelines.progress import counted
from pipelines.spec import Spec
from pipelines.tracking.held_out import send_score
from pipelines.tracking.mlflow_run import delete_others, describe, exists, make_run, set_tags
from pipelines.tracking.outage import is_outage
from pipelines.tracking.record import Lineage, Record, Records
from pipelines.tracking.rows import CLOCK, intervals, portions
from pipelines.train.end import known_end, settled_step
from pipelines.train.run import Attempt, Run, environment

_ATTEMPTS_TOLD = 40
"""The newest so many are in a tag."""
_LONGEST_TAG = 8000
"""Characters, by MLflow's own limit."""


class Account:
    """Of one run with the tracker of one name. The lock of its records is the caller's."""

    def __init__(self, name: str, records: Records, run: Run, spec: Spec, lineage: Lineage) -> None:
        self._name, self._records = name, records
        self._run, self._spec, self._lineage = run, spec, lineage

    @property
    def record(self) -> Record:
        return self._records.of(self._name)

    def owes(self, status: str | None = None) -> bool:
        """Whether there is anything to send, as far as is known here; `status` is how the run ended, if it did."""
        record, last = self.record, self._last_step()
        if status is not None and (record.status, record.ended_step) != (status, last):
            return last > 0 or status != "FINISHED"
        sent = self._whole(last) <= record.shipped_step and not self._unsent_scores()
        return not sent or not record.described or not self._tags(newest=1).items() <= record.tags.items()

    def open(self, client: Any, experiment_id: Callable[[], str], parent: str | None = None) -> str:
        """The id of the run's MLflow run, made and described where it is not."""
        record = self.record
        if record.run_id is None or not exists(client, record.run_id):
            record = Record(key=record.key)
            self._save(record)  # before it is made: the key must outlive a kill
            made = make_run(client, experiment_id(), self._run.name, record.key, self._lasting_tags())
            if made.was_there:  # with what was sent by another address, or unheard
                record = replace(record, status=made.ended, doubtful_step=self._spec.train.total_steps)
            record = self._save(replace(record, run_id=made.run_id))
        assert record.run_id is not None
        if not record.described:
            describe(client, record.run_id, self._spec, self._lineage, environment())
            self._save(replace(record, described=True))
        if parent is not None:
            set_tags(client, record.run_id, {"mlflow.parentRunId": parent})
        return record.run_id

    def go_on(self, client: Any) -> None:
        """The run is driven again: its MLflow run has not ended."""
        if (record := self.record).status is not None:
            client.update_run(record.run_id, status="RUNNING")
            self._save(replace(record, status=None, ended_step=None))

    def send(self, client: Any, status: str | None) -> int:
        """All that an open run owes; the number of steps whose rows were sent. `status` ends its MLflow run; FINISHED
        is for one whose last interval is sent though it be shorter. A longer run sends that interval again, whole.

        Failed where scores could not be sent, after all else was.
        """
        record = self.record
        assert record.run_id is not None
        if (tags := self._tags()) != record.tags:
            set_tags(client, record.run_id, tags)
            self._save(replace(record, tags=tags))
        steps = self._send_rows(client, record.run_id, tail=status == "FINISHED")
        errors = self._send_scores(client, record.run_id)
        if status is not None:
            self.tidy(client)
            client.set_terminated(record.run_id, status=status)
            self._save(replace(self.record, status=status, ended_step=self._last_step()))
        if errors:
            step, error = next(iter(errors.items()))
            raise Failed(f"the score of step {step} could not be sent: {one_line(error)}") from error
        return steps

    def tidy(self, client: Any) -> None:
        """Delete the MLflow runs that late requests made beside this one."""
        record = self.record
        assert record.run_id is not None
        delete_others(client, record.run_id, record.key)

    def _send_rows(self, client: Any, run_id: str, tail: bool) -> int:
        record, last = self.record, self._last_step()
        rows = self._run.journal.read(last, after=record.shipped_step)
        owed = list(intervals(rows, self._spec.train.log_every, tail))
        if owed and record.doubtful_step > record.shipped_step:
            there = {metric.step for metric in client.get_metric_history(run_id, CLOCK)}
            owed = [interval for interval in owed if interval[-1].step not in there]
        if owed:
            record = self._save(replace(record, doubtful_step=owed[-1][-1].step))
        for portion in portions(owed):
            client.log_batch(run_id, metrics=portion.metrics)
            record = self._save(replace(record, shipped_step=max(record.shipped_step, self._whole(portion.last_step))))
        self._save(replace(record, shipped_step=max(record.shipped_step, self._whole(last)), doubtful_step=0))
        return sum(len(interval) for interval in owed)

    def _send_scores(self, client: Any, run_id: str) -> dict[int, Exception]:
        """Each by itself: what is wrong with one picture, or with the place of all, keeps nothing else back."""
        errors: dict[int, Exception] = {}
        for step in self._unsent_scores():
            try:
                send_score(client, run_id, self._run.scores, step)
            except Exception as error:  # of MLflow's client, of its artifacts' place, or of the score's own files
                errors[step] = error
                if is_outage(error):
                    break
            else:
                self._save(replace(self.record, scored_steps=[*self.record.scored_steps, step]))
        return errors

    def _unsent_scores(self) -> list[int]:
        known, last = set(self.record.scored_steps), self._last_step()
        return [step for step in self._run.scores.steps() if step <= last and step not in known]

    def _last_step(self) -> int:
        """The last committed checkpoint's, for later rows may be made again; or an earlier one, where the run ends
        there by its limits or its `train.images`, or may by a score that is still to come: what lies behind it is
        discarded then, or a longer run's to send.
        """
        last = min(max(self._run.checkpoints.steps(), default=0), self._spec.train.total_steps)
        settled, end = settled_step(self._run, self._spec.train), known_end(self._run, self._spec.train)
        return min(last, last if settled is None else settled, last if end is None else end.step)

    def _whole(self, step: int) -> int:
        """Where the last whole interval up to a step ends."""
        return step - step % self._spec.train.log_every

    def _lasting_tags(self) -> dict[str, str]:
        run = self._run
        return {"ddpm.run": run.name, "ddpm.place": str(run.place), "ddpm.dataset_digest": self._lineage.digest}

    def _tags(self, newest: int = _ATTEMPTS_TOLD) -> dict[str, str]:
        """Of the newest attempt; and, where more than it is looked at, one that tells the history."""
        attempts = self._run.attempts(newest)
        if not attempts:
            return {}
        last = attempts[-1]
        tags = {
            "ddpm.attempt": str(last.number),
            "ddpm.workers": str(last.workers),
            "ddpm.host": ", ".join(last.hosts)[:_LONGEST_TAG],
        }
        if newest > 1:
            tags["ddpm.attempts"] = "\n".join(_told(attempt) for attempt in attempts)[-_LONGEST_TAG:]
        return tags

    def _save(self, record: Record) -> Record:
        self._records.save(self._name, record)
        return record


def _told(attempt: Attempt) -> str:
    workers, hosts = counted(attempt.workers, "worker"), ", ".join(attempt.hosts)
    return f"{attempt.number}: {workers} on {hosts}, from step {attempt.step}"
