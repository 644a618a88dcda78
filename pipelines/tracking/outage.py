"""Whether an error says that MLflow, or what is below it, does not answer, or that something else is wrong."""

from typing import Any

from pipelines.files import StorageError

_CLIENTS = {"mlflow", "requests", "urllib3", "sqlalchemy"}
_AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED"}
"""MLflow's codes of a server or database that cannot be reached, or cannot do its work."""


def is_of_mlflow(error: BaseException) -> bool:
    """Whether MLflow's client raised it, or what that sends its requests with."""
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def is_outage(error: BaseException) -> bool:
    """Whether the next request to the same address would fare no better, whatever it asked for."""
    if isinstance(error, StorageError) or not is_of_mlflow(error):
        return isinstance(error, ConnectionError | TimeoutError)
    if (code := getattr(error, "error_code", None)) is not None:
        return code in _AWAY
    response: Any = getattr(error, "response", None)  # of `requests`, where there was one
    return response is None or response.status_code >= 500
