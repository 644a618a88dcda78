"""Register a model's version in MLflow, list versions, fetch one back.

A version's artifact is `ema.safetensors` and `config.json`, wrapped in a model from code; its tags say where it comes
from and what evidence it carries.
"""

import contextlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.models import CONFIG, WEIGHTS, Model, dump_config
from pipelines.sections import NAME

CHAMPION = "champion"
_REQUIREMENTS = ("torch", "safetensors", "numpy", "pyyaml", "pydantic")


def register(model: Model, name: str, run_id: str, tracking_uri: str, tags: Mapping[str, str]) -> int:
    """Make a version of the registered model `name`; returns its number."""
    import importlib.metadata

    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    import ddpm_core
    import pipelines

    size, channels = model.spec.data.image_size, model.spec.data.channels
    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "seed")]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, channels))]),
    )
    with tempfile.TemporaryDirectory() as folder, _fluent(tracking_uri), mlflow.start_run(run_id=run_id), _unsaid():
        (Path(folder) / WEIGHTS).write_bytes(model.weights)
        (Path(folder) / CONFIG).write_bytes(dump_config(model))
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"weights": f"{folder}/{WEIGHTS}", "config": f"{folder}/{CONFIG}"},
            code_paths=[str(Path(package.__path__[0])) for package in (ddpm_core, pipelines)],
            pip_requirements=[f"{p}=={importlib.metadata.version(p)}" for p in _REQUIREMENTS],
            signature=signature,
            registered_model_name=name,
        )
    registry = client(tracking_uri)
    version = int(info.registered_model_version)
    for key, value in {**tags, "model": model.identity, "model_digest": model.digest, "origin": model.origin}.items():
        registry.set_model_version_tag(name, str(version), key, value)
    return version


def download(name: str, version: str, tracking_uri: str) -> Model:
    """The model `name@version`, where version is a number or an alias. UserError where there is none."""
    import mlflow

    found = find_version(name, version, tracking_uri)
    with tempfile.TemporaryDirectory() as folder, _fluent(tracking_uri):
        local = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{found.version}", dst_path=folder)
        artifacts = Path(local) / "artifacts"
        config = json.loads((artifacts / CONFIG).read_text())
        return Model.from_config(config, (artifacts / WEIGHTS).read_bytes(), f"{name}@{version}")


def find_version(name: str, version: str, tracking_uri: str) -> Any:
    """MLflow's record of `name@version`. UserError where there is none."""
    from mlflow.exceptions import MlflowException

    registry = client(tracking_uri)
    try:
        if version.isdigit():
            return registry.get_model_version(name, version)
        return registry.get_model_version_by_alias(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(f"MODEL {name}@{version}: no such version or alias in {tracking_uri}") from None


def list_models(tracking_uri: str, name: str | None = None) -> list[dict[str, Any]]:
    """Registered models with their versions, tags and aliases, as plain values."""
    registry = client(tracking_uri)
    models = []
    for registered in _registered(registry, name) if name is None or re.fullmatch(NAME, name) else ():
        aliases = registered.aliases
        versions = [
            {
                "version": int(version.version),
                "aliases": sorted(a for a, v in aliases.items() if int(v) == int(version.version)),
                "created_ms": version.creation_timestamp,
                "run_id": version.run_id,
                "tags": dict(version.tags),
            }
            for version in registry.search_model_versions(f"name='{registered.name}'")
        ]
        versions.sort(key=lambda v: v["version"])
        models.append(
            {"name": registered.name, "aliases": {a: int(v) for a, v in aliases.items()}, "versions": versions}
        )
    if name is not None and not models:
        raise UserError(f"model {name}: not registered in {tracking_uri}")
    return models


def _registered(registry: Any, name: str | None) -> Iterator[Any]:
    """MLflow's records of all registered models, or of the named one, page by page."""
    wanted, page = None if name is None else f"name = '{name}'", None
    while True:
        found = registry.search_registered_models(filter_string=wanted, page_token=page)
        yield from found
        if not (page := found.token):
            return


def client(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """MLflow's advice to the authors of models, and its prints, are not for our user; its errors are raised."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _fluent(tracking_uri: str) -> Iterator[None]:
    """Some of MLflow has only the fluent interface: point it here for the block, and back."""
    import mlflow

    # MLflow sets the environment along, where other parts would find it; of nothing said, its getters make an address.
    said = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(said["MLFLOW_TRACKING_URI"])
        mlflow.set_registry_uri(said["MLFLOW_REGISTRY_URI"])
        for name, value in said.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
