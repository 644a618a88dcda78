"""A run begins with the weights that named it, and only with weights that mean here what they meant."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler

from pipelines.build import build_model, build_process
from pipelines.cluster import Cluster
from pipelines.data.ingest import ingest
from pipelines.data.manifest import Dataset
from pipelines.drawing import Settings, draw
from pipelines.errors import UserError
from pipelines.evaluate.likelihood import held_out_bits
from pipelines.foreign import of_diffusers
from pipelines.interop import Portable, write_diffusers
from pipelines.models import dump_config, of_checkpoint
from pipelines.pipeline import run, run_sweep, run_training, train_step
from pipelines.progress import Progress
from pipelines.registry.register import register
from pipelines.session import Session, open_session
from pipelines.spec import Spec, load_spec, parse_spec
from pipelines.store import Place
from pipelines.train import driver
from pipelines.train.driver import Trained
from pipelines.train.initial import read_initial
from pipelines.train.loop import train
from pipelines.train.registered import with_first_weights
from pipelines.train.run import Run, check_trainable
from tests.conftest import tiny_fields, tiny_spec, write_spec
from tests.interop.interop_helpers import CIFAR10, DIGITS, WEIGHTS, assert_equal_outputs, theirs
from tests.s3_faults import BUCKET, FaultyProxy

MODEL = tiny_fields()["model"]
DIFFUSION = tiny_fields()["diffusion"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = Place.of(tmp_path_factory.mktemp("data") / "digits")
    return ingest("digits", out, image_size=8, channels=1, held_out=0.4, shard_images=100)


def exported(spec: Spec, folder: Path) -> str:
    """A folder of diffusers' with the network and the process of a spec, untrained."""
    process, unet = build_process(spec.diffusion), build_model(spec)
    portable = Portable(
        config=unet.config,
        weights=unet.state_dict(),
        schedule=process.schedule,
        predict=process.predict,
        variance=process.variance,
        image_size=8,
    )
    write_diffusers(portable, folder)
    return str(folder)


def begun(spec: Spec, dataset: Dataset, store: Path) -> Run:
    """A run of that spec, trained to its first checkpoint."""
    short = spec.model_copy(update={"train": spec.train.model_copy(update={"images": 32})})
    run = Run.of(short, dataset.digest, Place.of(store))
    run.describe(short, dataset.digest)
    train(short, dataset, run)
    return run


def assert_fits(spec: Spec, dataset: Dataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainable(spec, dataset)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"norm_eps": 1e-6}, {}, "model.norm_eps is 1.0e-06 there, 1.0e-05 here"),
        ({"time_sine_first": True}, {}, "model.time_sine_first is true there, false here"),
        ({}, {"time_frequency_shift": 1}, "model.time_frequency_shift is 0 there, 1 here"),
        ({"asymmetric_downsample": True}, {}, "model.asymmetric_downsample is true there, false here"),
        ({"attention": [1], "head_channels": 8}, {"attention": [1]}, "model.head_channels is 8 there, null here"),
        ({"groups": 4}, {}, "model.groups is 4 there, 8 here"),
        ({"channels": [16, 32]}, {}, "model.channels is [16, 32] there, [16, 16] here"),
        ({"classes": 10}, {"classes": 10, "null_class": False}, "model.null_class is true there, false here"),
    ],
)
def test_weights_of_another_network_are_refused_by_field(
    theirs: dict[str, Any], ours: dict[str, Any], said: str, dataset: Dataset, tmp_path: Path
) -> None:
    """Though their names and shapes may be the same. The sections that fit are offered, to be pasted."""
    folder = exported(tiny_spec(model={**MODEL, **theirs}), tmp_path / "out")
    with pytest.raises(UserError) as caught:
        check_trainable(tiny_spec(model={**MODEL, **ours}, train__init_from=folder, train__label_dropout=0.0), dataset)
    message = str(caught.value)
    assert message.startswith(f"train.init_from: {folder} holds the weights of another network: {said}")
    assert "\n" not in message

    model, _, diffusion = message.partition("set model: ")[2].partition(" and diffusion: ")
    sections = {"model": yaml.safe_load(model), "diffusion": yaml.safe_load(diffusion)}
    assert_fits(parse_spec(tiny_fields(**sections, train__init_from=folder)), dataset)


def test_a_checkpoint_means_what_its_run_says(dataset: Dataset, tmp_path: Path) -> None:
    first = begun(tiny_spec(model={**MODEL, "norm_eps": 1e-6}), dataset, tmp_path)
    folder = str(first.checkpoints.at(1))
    with pytest.raises(UserError, match=r"model\.norm_eps is 1\.0e-06 there, 1\.0e-05 here"):
        check_trainable(tiny_spec(train__init_from=folder), dataset)
    assert_fits(tiny_spec(model={**MODEL, "norm_eps": 1e-6}, train__init_from=folder), dataset)

    alone = str(shutil.copytree(folder, tmp_path / "alone"))
    with pytest.warns(UserWarning, match=r"alone has left its run's folder, .* only their shapes are compared"):
        check_trainable(tiny_spec(train__init_from=alone), dataset)
    wider = tiny_spec(model={**MODEL, "channels": [16, 32]}, train__init_from=alone)
    with pytest.warns(UserWarning, match="alone"), pytest.raises(UserError, match=r"is \(\d.*\) there, \(\d.*\) here"):
        check_trainable(wider, dataset)


def test_what_has_no_effect_on_the_network_may_differ(dataset: Dataset, tmp_path: Path) -> None:
    theirs = {"head_channels": 8, "dropout": 0.2, "null_class": False}
    folder = exported(tiny_spec(model={**MODEL, **theirs}), tmp_path / "out")
    assert_fits(tiny_spec(train__init_from=folder), dataset)
    one_head = {**MODEL, "attention": [1, 0], "head_channels": 16}
    folder = exported(tiny_spec(model=one_head), tmp_path / "one-head")
    assert_fits(tiny_spec(model={**MODEL, "attention": [0, 1]}, train__init_from=folder), dataset)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"predict": "v"}, "trained to predict v, not eps, which"),
        ({"schedule": {"kind": "linear", "beta_end": 0.3}}, "trained on another noise schedule, which"),
        ({"timesteps": 100}, "trained with 100 timesteps, not 50, which"),
        (
            {"predict": "x0", "zero_terminal": True},
            "trained to predict x0, not eps and on another noise schedule, which",
        ),
    ],
)
def test_another_process_is_warned_of(theirs: dict[str, Any], said: str, dataset: Dataset, tmp_path: Path) -> None:
    folder = exported(tiny_spec(diffusion={**DIFFUSION, **theirs}), tmp_path / "out")
    with pytest.warns(UserWarning, match=said) as warned:
        check_trainable(tiny_spec(train__init_from=folder), dataset)
    message = str(warned[-1].message)
    offered = yaml.safe_load(message.partition("as they were trained: diffusion: ")[2])
    if not offered.get("zero_terminal"):  # its numbers are too many for a line
        assert_fits(tiny_spec(diffusion=offered, train__init_from=folder), dataset)
    assert len(message) < 500


def test_another_variance_of_the_reverse_step_is_none_of_its_business(dataset: Dataset, tmp_path: Path) -> None:
    folder = exported(tiny_spec(diffusion={**DIFFUSION, "variance": "large"}), tmp_path / "out")
    assert_fits(tiny_spec(train__init_from=folder), dataset)
    learned = {**DIFFUSION, "variance": "learned_range"}
    with pytest.raises(UserError, match=r"a learned diffusion\.variance is false there, true here"):
        check_trainable(tiny_spec(diffusion=learned, train__init_from=folder, train__loss="hybrid"), dataset)


def test_every_verb_that_trains_refuses_before_ray_starts(tmp_path: Path) -> None:
    folder = exported(tiny_spec(model={**MODEL, "channels": [16, 32]}), tmp_path / "out")
    spec = tiny_spec(train__init_from=folder)
    with Cluster(None) as unused:
        session = open_session(unused, Progress(), spec, str(tmp_path / "store"))
        swept = parse_spec({**spec.model_dump(mode="json"), "sweep": {"parameters": {"seed": [1, 2]}}})
        for verb, given in ((run_training, spec), (run, spec), (run_sweep, swept)):
            with pytest.raises(UserError, match=r"model\.channels is \[16, 32\] there, \[16, 16\] here"):
                verb(given, session)


def test_weights_that_were_changed_since_they_named_the_run_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = exported(tiny_spec(), tmp_path / "out")
    spec = tiny_spec(train__images=32, train__init_from=folder)
    run = Run.of(spec, dataset.digest, Place.of(tmp_path))
    run.describe(spec, dataset.digest)

    weights = tmp_path / "out/unet/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    changed = {name: value + 1e-3 for name, value in safetensors.torch.load(before).items()}
    safetensors.torch.save_file(changed, weights)
    with pytest.raises(UserError, match=f"the weights in {folder} are not those that run {run.name} was named by"):
        train(spec, dataset, run)
    assert run.checkpoints.steps() == []
    assert Run.of(spec, dataset.digest, Place.of(tmp_path)).name != run.name

    weights.write_bytes(before)
    assert train(spec, dataset, run).step == 1


def test_a_step_is_not_remembered_as_what_other_weights_came_to(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(tiny_spec(), tmp_path / "out")
    spec = tiny_spec(train__images=32, train__init_from=folder)
    with Cluster(None) as unused:
        step = train_step(spec, dataset, open_session(unused, Progress(), spec, str(tmp_path / "store")))
    trained = Trained("tiny-of-others", "", 1, 1, "", "", 0)
    monkeypatch.setattr(driver, "train", lambda *_: trained)
    with pytest.raises(UserError, match="were changed at the start"):
        step.work()


def test_a_network_that_diffusers_made_is_drawn_with_scored_and_trained_on(dataset: Dataset, tmp_path: Path) -> None:
    """With the conventions of the published checkpoints, from a folder of DDIM in shards."""
    widths = {"block_out_channels": [32, 32], "attention_head_dim": None, "layers_per_block": 1, "add_attention": False}
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    unet = theirs(**{**CIFAR10, **DIGITS, **widths, **blocks})
    folder = tmp_path / "made"
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=50, beta_start=0.002, beta_end=0.4)).save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")

    found = of_diffusers(str(folder))
    images = draw(*found.build(), 8, Settings.of(found.spec.sample), range(2))
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    assert 0 < held_out_bits(found, dataset, found.spec) < 1000

    sections = {name: getattr(found.spec, name).model_dump(mode="json") for name in ("model", "diffusion")}
    train_fields = {**tiny_fields()["train"], "images": 32, "learning_rate": 1e-12, "init_from": str(folder)}
    spec = parse_spec(tiny_fields(**sections, train=train_fields))
    assert_fits(spec, dataset)
    _, trained = of_checkpoint(begun(spec, dataset, tmp_path), 1).build()
    assert_equal_outputs(trained, unet, 8)


def test_a_registered_model_is_where_a_run_begins(session: Session, dataset: Dataset) -> None:
    first = begun(tiny_spec(model={**MODEL, "norm_eps": 1e-6}), dataset, session.store.path)
    model, tracker = of_checkpoint(first, 1), session.tracker
    version = register(model, "tiny", tracker.run_id(first, first.spec(), dataset), session.tracking_uri, {})
    named = tiny_spec(model={**MODEL, "norm_eps": 1e-6}, train__init_from=f"tiny@{version}", train__images=32)
    surroundings = dict(os.environ)
    resolved = with_first_weights(named, session)
    assert dict(os.environ) == surroundings, "MLflow's address is none of the next store's business"
    assert resolved.train.init_from is not None
    # The same run as from the checkpoint that was registered; and the folder says what its weights mean.
    there = named.model_copy(
        update={"train": named.train.model_copy(update={"init_from": str(first.checkpoints.at(1))})}
    )
    assert Run.of(resolved, dataset.digest, session.store).name == Run.of(there, dataset.digest, session.store).name
    assert_fits(resolved, dataset)
    with pytest.raises(UserError, match=r"model\.norm_eps is 1\.0e-06 there, 1\.0e-05 here"):
        check_trainable(tiny_spec(train__init_from=resolved.train.init_from), dataset)
    outcome = train(resolved, dataset, started := described(resolved, dataset, session))
    assert outcome.step == 1
    begins = build_model(resolved)
    begins.load_state_dict(safetensors.torch.load(model.weights))
    moved = started.checkpoints.load(1).model
    assert all((moved[name] - weight).abs().max() < 0.01 for name, weight in begins.state_dict().items())

    missing = tiny_spec(train__init_from="tiny@7")
    with pytest.raises(UserError, match=r"train\.init_from: tiny@7: no such version or alias in sqlite"):
        run_training(missing, session)


def described(spec: Spec, dataset: Dataset, session: Session) -> Run:
    run = Run.of(spec, dataset.digest, session.store)
    run.describe(spec, dataset.digest)
    return run


def test_first_weights_may_lie_on_s3(dataset: Dataset, proxy: FaultyProxy, tmp_path: Path) -> None:
    spec = tiny_spec(model={**MODEL, "norm_eps": 1e-6})
    run = begun(spec, dataset, tmp_path)
    local, model = run.checkpoints.at(1), of_checkpoint(run, 1)
    there = Place.of(f"s3://{BUCKET}/weights")
    there.commit_folder({"ema.safetensors": model.weights, "config.json": dump_config(model)})
    found = read_initial(str(there))
    assert found.digest == read_initial(str(local)).digest
    assert found.spec is not None
    assert found.spec.model.norm_eps == 1e-6
    with pytest.raises(UserError, match=r"train\.init_from: s3://.* is neither a checkpoint nor a folder of diffusers"):
        read_initial(f"s3://{BUCKET}/nothing")
    spec_file = write_spec(tmp_path / "spec.yaml", train__init_from=str(there))
    assert load_spec(spec_file).train.init_from == str(there)
