"""`ddpm export`, through the command's own front."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import CliRunner

from jobs.cli import app
from pipelines.data.ingest import ingest
from pipelines.errors import UserError
from pipelines.foreign import of_diffusers
from pipelines.interop import export_diffusers, read_diffusers
from pipelines.models import of_checkpoint
from pipelines.store import Place
from pipelines.train.loop import train
from pipelines.train.run import Run
from tests.conftest import tiny_spec
from tests.interop.interop_helpers import DIGITS, assert_equal_outputs, saved, theirs


def exported(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["export", *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_is_exported_and_loaded_by_diffusers(tmp_path: Path) -> None:
    spec = tiny_spec(train__images=32)
    dataset = ingest("digits", Place.of(tmp_path / "data"), image_size=8, channels=1, held_out=0.4, shard_images=1000)
    store, out = Place.of(tmp_path / "store"), tmp_path / "out"
    run = Run.of(spec, dataset.digest, store)
    run.describe(spec, dataset.digest)
    train(spec, dataset, run)

    result = exported(run.name, str(out), "--format", "diffusers", "--storage", str(store))
    assert (result["out"], result["model"]) == (str(out), f"{run.name}/1")
    written = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert result["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in written.items()}
    _, unet = of_checkpoint(run, 1).build()
    assert_equal_outputs(unet, DDPMPipeline.from_pretrained(out).unet, 8)


def test_a_folder_of_diffusers_is_exported_as_the_same_model(tmp_path: Path) -> None:
    given = saved(tmp_path / "given", theirs(**DIGITS), DDPMScheduler(variance_type="fixed_large"))
    result = exported(str(given), str(tmp_path / "out"), "--storage", str(tmp_path / "store"))
    assert result["model"] == "diffusers: given"
    before, after = read_diffusers(given), read_diffusers(tmp_path / "out")
    meant = replace(before.config, head_channels=None)  # which say nothing without attention
    assert (after.config, after.predict, after.variance) == (meant, before.predict, before.variance)
    assert torch.equal(after.schedule.alpha_bar, before.schedule.alpha_bar)
    assert all(torch.equal(after.weights[name], value) for name, value in before.weights.items())


def test_what_cannot_be_exported_is_bad_input(tmp_path: Path) -> None:
    given = saved(tmp_path / "given", theirs(**DIGITS))
    for words, said in (
        (["--format", "onnx"], "--format onnx: only diffusers can be written"),
        (["--storage", str(tmp_path / "store")], "is there already and no empty folder"),
    ):
        with pytest.raises(UserError, match=said):
            CliRunner().invoke(app, ["export", str(given), str(given), *words], catch_exceptions=False)


def test_an_export_with_classes_says_that_the_pipeline_gives_none(tmp_path: Path) -> None:
    given = saved(tmp_path / "given", theirs(**DIGITS, num_class_embeds=4))
    with pytest.warns(UserWarning, match="DDPMPipeline gives its network no class"):
        export_diffusers(of_diffusers(str(given)), tmp_path / "out")
    with pytest.raises(ValueError, match="class_labels should be provided"):
        DDPMPipeline.from_pretrained(tmp_path / "out")(num_inference_steps=1)
