"""The only part that sends metrics, parameters and pictures to MLflow.

The journal in the run's folder is the truth; MLflow gets a copy of the rows at or before a committed checkpoint, with
the journal's timestamps, so that a row sent twice is stored once and a kill can neither double nor lose a step. Nothing
waits for MLflow: what a run owes it is sent from a thread of its own, and what could not be sent at the next chance.
"""

from pipelines.tracking.address import Address, set_mlflow_up
from pipelines.tracking.tracker import Tracker

__all__ = ["Address", "Tracker", "set_mlflow_up"]
