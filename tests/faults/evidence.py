"""What is compared of two runs, bit for bit, and what the tracker must hold of one."""

from collections import Counter

from mlflow import MlflowClient
from mlflow.entities import ViewType

from pipelines.train.checkpoint import EMA, MODEL, OPTIMIZER
from pipelines.train.run import Run
from tests.faults.command import Command


def assert_same_bits(one: Command, other: Command) -> None:
    """Two runs ended at the same step with the same bits, and so tell their trackers."""
    assert one.kept() == other.kept()
    assert_same_training(one.run, other.run, one.kept())
    assert tracked(one) == tracked(other)


def assert_same_training(one: Run, other: Run, step: int) -> None:
    """Weights, averages and optimizer of a step are the same files, and the journals tell of each step once, alike."""
    for name in (MODEL, EMA, OPTIMIZER):
        files = [(run.checkpoints.at(step) / name).read() for run in (one, other)]
        assert files[0] == files[1], f"{name} of step {step} differs"
    rows = [[(row.step, row.images, row.exact) for row in run.journal.read(step)] for run in (one, other)]
    assert [row[0] for row in rows[0]] == list(range(1, step + 1))
    assert rows[0] == rows[1]


def tracked(of: Command) -> dict[str, dict[int, float]]:
    """The exact metrics that the tracker holds of a run, by step; each step of every metric is there once, and all that
    are the journal's are its bits.
    """
    client = MlflowClient(tracking_uri=f"sqlite:///{of.store}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'ddpm'")
    (found,) = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert found.info.status == "FINISHED"
    rows = {row.step: row.exact for row in of.run.journal.read(of.kept())}
    exact: dict[str, dict[int, float]] = {}
    for name in found.data.metrics:
        history = client.get_metric_history(found.info.run_id, name)
        often = {step: times for step, times in Counter(metric.step for metric in history).items() if times > 1}
        assert not often, f"the tracker holds {name} more than once of steps {often}"
        values = {metric.step: metric.value for metric in history}
        told = {step: row[name] for step, row in rows.items() if name in row}
        if told:
            assert values == told, f"the tracker's {name} is not the journal's"
            exact[name] = values
        else:
            assert set(values) <= set(rows)
    assert set(exact) == {name for row in rows.values() for name in row}, "each exact name of the journal"
    return exact
