"""Stages on disk: each result lies under a hash of its settings (not of the code), written whole or not at all."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from pipelines.store import Place, canonical_json, identity

VERSION = 1
"""Raised with the code wherever the same recipes now mean other results."""


@dataclass(frozen=True)
class Cache:
    """A folder of results. A recipe holds plain values; those of the stages that it builds on are parts of it."""

    place: Place
    compute: bool = True
    """Whether what is missing is made; else it is None."""

    def numbers(self, stage: str, recipe: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
        """A result of plain values, its recipe beside it in the file; None where it is neither there nor made."""

        def text() -> bytes:
            return (json.dumps({"result": make(), "recipe": recipe}, indent=1) + "\n").encode()

        data = self.raw(stage, recipe, text, ".json")
        return None if data is None else json.loads(data)["result"]

    def tensors(
        self, stage: str, recipe: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        """A result of named tensors, its recipe in the file's metadata; None where it is neither there nor made."""

        def packed() -> bytes:
            return safetensors.save(make(), metadata={"recipe": canonical_json(recipe)})

        data = self.raw(stage, recipe, packed, ".safetensors")
        return None if data is None else safetensors.load(data)

    def raw(self, stage: str, recipe: Mapping[str, Any], make: Callable[[], bytes], suffix: str = "") -> bytes | None:
        """The bytes of a result; None where it is neither there nor made."""
        key = identity({"version": VERSION, "stage": stage, "torch": str(torch.__version__), "recipe": recipe})
        file = self.place / f"{stage}-{key[:20]}{suffix}"
        if file.exists():
            return file.read()
        if not self.compute:
            return None
        start = time.perf_counter()
        data = make()
        file.write(data)
        seconds = time.perf_counter() - start
        print(f"{time.strftime('%H:%M:%S')}  {seconds:7.1f} s  {stage}  {_told(recipe)}", file=sys.stderr, flush=True)
        return data


def _told(recipe: Mapping[str, Any]) -> str:
    """What tells a stage from the others, in a few words."""
    flat: dict[str, Any] = {}

    def collect(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(value)
            else:
                flat.setdefault(name, value)

    collect(recipe)
    names = ("predict", "loss", "schedule", "timed", "seed", "sampler", "variance", "steps")
    return " ".join(f"{name}={flat[name]}" for name in names if name in flat)
