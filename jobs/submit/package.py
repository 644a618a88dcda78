"""What a job needs of its client: a spec that means the same on every host, and this installation's code."""

import os
import shlex
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import UserError
from pipelines.spec import RayCluster, Spec, dump_spec
from pipelines.store import Place

DISTRIBUTION = "ddpm-pipelines"
PACKAGES = ("ddpm_core", "pipelines", "jobs")
SPEC_FILE = "spec.yaml"
_SHIPPED = (".py", ".yaml")
"""Source files and presets."""
_FIX = "--storage /an/absolute/path/that/every/host/sees"


def portable(spec: Spec, storage: str | None, tracking_uri: str | None) -> Spec:
    """The spec with its store and tracker written out, as every host of a cluster would read them.

    They are looked for where every verb looks ($DDPM_STORAGE and $MLFLOW_TRACKING_URI are the client's, not the
    head's). UserError where the store, the tracker or the images are named relative to a working directory.
    """
    store = storage or spec.storage or os.environ.get("DDPM_STORAGE")
    if store is None:
        raise UserError(f"storage: a cluster's hosts do not share ./ddpm-store: give {_FIX}")
    if not _is_absolute(store):
        raise UserError(f"storage: {store} is a relative path, which differs from host to host: give {_FIX}")
    tracker = tracking_uri or spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if tracker is not None and _is_relative_tracker(tracker):
        raise UserError(
            f"tracking.uri: {tracker} is a relative path, which differs from host to host: give an absolute one "
            "(sqlite:////absolute/mlflow.db) or an MLflow server's address"
        )
    if spec.data.source != "digits" and "://" not in spec.data.source and not Path(spec.data.source).is_absolute():
        raise UserError(
            f"data.source: {spec.data.source} is a relative path, which differs from host to host: "
            "give --set data.source=/an/absolute/path/that/every/host/sees"
        )
    if spec.data.cache is not None and not Path(spec.data.cache.folder).is_absolute():
        raise UserError(
            f"data.cache.folder: {spec.data.cache.folder} is a relative path, which differs from host to host: "
            "give an absolute one, on a local disk of each host"
        )
    return spec.model_copy(
        update={
            "storage": str(Place.of(store)),
            "tracking": spec.tracking.model_copy(update={"uri": tracker}),
            "ray": RayCluster(),  # the job joins the cluster that it runs on
        }
    )


def fill_working_dir(folder: Path, spec: Spec) -> int:
    """Put the spec and this installation's packages into a folder; returns its size in bytes."""
    (folder / SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")
    for package in PACKAGES:
        root = _root(package)
        for source in _shipped_files(root):
            target = folder / package / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    # A checkpoint records which version made it: this one, whatever is installed on the host, or nothing is.
    own = version(DISTRIBUTION)
    described = folder / f"{DISTRIBUTION.replace('-', '_')}-{own}.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {own}\n", encoding="utf-8")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def entrypoint(spec: Spec, verb: str) -> str:
    """The job's command line, for the shell that Ray starts in the working directory."""
    words = ["python", "-m", "jobs", verb, SPEC_FILE, "--json", "--storage", str(spec.storage)]
    if spec.tracking.uri is not None:
        words += ["--tracking-uri", spec.tracking.uri]
    return shlex.join([*words, "--set", "ray.address=auto"])


def _root(package: str) -> Path:
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _shipped_files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
        if file.suffix in _SHIPPED and not hidden and file.is_file():
            yield file


def _is_absolute(uri: str) -> bool:
    """Whether a place is named in full; other schemes than file:// always are."""
    path = uri.removeprefix("file://")
    return "://" in path or Path(path).is_absolute()


def _is_relative_tracker(uri: str) -> bool:
    if uri.startswith("sqlite"):
        return "////" not in uri  # sqlite:////absolute, but sqlite:///relative
    return not (_is_absolute(uri) or uri.startswith("databricks"))
