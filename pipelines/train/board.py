"""Where the driver of a run and its workers leave each other notes, if the run's store is not on a file system.

Several times a second they look whether there is one, or replace one. In a store on S3 each would be a request that is
paid and waited for, and while the store is out of reach nobody could be told. They all are processes of one Ray, whose
head keeps small values by name; nothing of this is part of the run.
"""

import errno
import sys
from typing import Any

from pipelines.errors import one_line
from pipelines.files import StorageError
from pipelines.store import Place

_NAMESPACE = "ddpm"


class RayBoard(Place):
    """A note, or the folder of a run's. In a process that is not connected to Ray there are none, and writing one is a
    StorageError."""

    is_local = False
    key: str

    def __init__(self, key: str) -> None:
        self.__dict__.update(key=key)

    def __truediv__(self, name: str) -> "RayBoard":
        return RayBoard(f"{self.key}/{name}")

    def __str__(self) -> str:
        return f"ray:{self.key}"

    def read(self) -> bytes:
        data = self._ask("_internal_kv_get")
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such note", str(self))
        return data

    def write(self, data: bytes) -> None:
        if not _is_connected():
            raise StorageError(f"{self}: nobody is there to tell it to, for this process is not connected to Ray")
        self._ask("_internal_kv_put", data)

    def delete(self) -> None:
        self._ask("_internal_kv_del")

    def _ask(self, what: str, *value: bytes) -> Any:
        if not _is_connected():
            return None
        from ray.exceptions import RayError
        from ray.experimental import internal_kv

        try:
            return getattr(internal_kv, what)(self.key, *value, namespace=_NAMESPACE)
        except (RayError, OSError) as error:
            raise StorageError(f"{self}: Ray's head does not answer: {one_line(error)}") from None


def _is_connected() -> bool:
    ray = sys.modules.get("ray")  # who has not loaded it is not connected to it
    return ray is not None and ray.is_initialized()
