"""The spec: what is read is what was written, and each mistake is one line that names field and fix."""

import re
import warnings
from pathlib import Path

import pytest
import yaml

from pipelines.errors import UserError
from pipelines.fields import read_yaml
from pipelines.spec import dump_spec, load_spec, parse_spec
from pipelines.unused import without_effect
from tests.conftest import tiny_fields, tiny_spec, write_spec

PRESETS = sorted((Path(__file__).parent.parent / "jobs" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.name)
def test_presets_are_valid(path: Path) -> None:
    spec = load_spec(path)
    assert parse_spec(yaml.safe_load(dump_spec(spec))) == spec


def test_a_written_spec_is_the_spec_also_where_nothing_is_meant() -> None:
    """Left out, `grad_clip` is 1: no clipping has to be said."""
    spec = tiny_spec(train__grad_clip=None)
    assert parse_spec(yaml.safe_load(dump_spec(spec))) == spec


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.imagse=3", "unknown field train.imagse: did you mean train.images?"),
        ("trian.images=3", "unknown field trian: did you mean train?"),
        ("train.sed=1", "unknown field train.sed: did you mean seed?"),
        ("diffusion.schedule={betastart: 3}", "did you mean diffusion.schedule.beta_start?"),
        ("train.images=many", "train.images: "),
        ("train.images=1.5", "train.images: "),
        ("train.slots=3", "train.slots: 3 is not a power of two"),
        ("train.workers=[2, 1]", r"train.workers: [2, 1] is not [least, most]"),
        ("train.global_batch=30", "train.global_batch: 30 is not a multiple of train.slots = 4"),
        ("data.image_size=9", "data.image_size: 9 is not divisible by 2"),
        ("data.image_size=4", "data.image_size: "),
        ("data.shift=8", "data.shift: 8 pixels leave nothing of an image of 8"),
        ("data.held_out=1.0", "data.held_out: "),
        ("data.on_error=ignore", "data.on_error: there is no 'ignore': choose one of raise, skip"),
        ("data.cache.foldr=x", "unknown field data.cache.foldr: did you mean data.cache.folder?"),
        ("sample.steps=51", "sample.steps: 51 is more than diffusion.timesteps = 50"),
        ("sample={sampler: ancestral, eta: 0.5}", "sample.eta: belongs to the ddim sampler"),
        ("model.groups=5", "model.groups: 5 does not divide 16"),
        ("train.grad_clip=.inf", "train.grad_clip: "),
        ("train.images.x.y=1", "train.images: "),
        ("evaluate.bits_images=1", "evaluate.bits_images: "),
        ("diffusion.schedule={kind: sigmoid, start: 3.0, end: -3.0}", "diffusion: finite start < end and tau > 0"),
        ("diffusion={timesteps: 1000, schedule: {kind: linear, beta_end: 0.95}}", "diffusion: alpha_bar must fall"),
        ("diffusion.schedule={kind: cosine, s: 1.0e+300}", "diffusion: "),
        ("model={channels: [7, 7], groups: 7}", "model: the first entry of channels must be even"),
        ("diffusion.schedule.kind=wavy", "diffusion.schedule.kind: there is no 'wavy': choose one of linear, "),
        ("diffusion.schedule.kind=cosin", "diffusion.schedule.kind: there is no 'cosin': did you mean cosine?"),
        ("diffusion.predict=epsilon", "diffusion.predict: there is no 'epsilon': did you mean eps?"),
        ("data.channels=2", "data.channels: there is no 2: choose one of 1, 3"),
        ("diffusion.schedule.s=a", "diffusion.schedule.s: "),
        ("data=3", "data: fields are needed here (name: value), not 3"),
        ("name=../up", "name: "),
        ("model.attention=[5]", "model.attention: there is no level 5"),
        ("model={channels: [16, 16], groups: 8, classes: 10, null_class: false}", "train.label_dropout: 0.1 of the"),
        ("sample.guidance=2.0", "sample.guidance: it needs model.classes, and train.label_dropout above 0"),
    ],
)
def test_a_mistake_is_one_line_naming_field_and_fix(tmp_path: Path, override: str, message: str) -> None:
    path = write_spec(tmp_path / "spec.yaml")
    with pytest.raises(UserError) as caught:
        load_spec(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_classes_alone_hides_no_label_and_is_not_guided() -> None:
    model = {"channels": [16, 16], "groups": 8, "classes": 10, "null_class": False}
    assert tiny_spec(model=model, train__label_dropout=0.0).model.classes == 10
    with pytest.raises(UserError, match=r"sample\.guidance: it needs"):
        tiny_spec(model=model, train__label_dropout=0.0, sample__guidance=2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.label_dropout=0.2"], "train.label_dropout: has no effect without model.classes"),
        (["model.null_class=false"], "model.null_class: has no effect without model.classes"),
        (["model.head_channels=8"], "model.head_channels: has no effect without model.attention or model.mid_atten"),
        (["train.ema_profiles=[0.1, 0.05, 0.1]"], "train.ema_profiles: 0.1 is there more than once"),
        (["train.ema_snapshot_every=64"], "train.ema_snapshot_every: has no effect without train.ema_profiles"),
        (["diffusion.variance=large"], "diffusion.variance: large has no effect on samples by ddim"),
        (["diffusion.variance=large", "sample.sampler=dpmpp_2m"], "large has no effect on samples by dpmpp_2m"),
        (["diffusion.variance=learned_range", "train.loss=hybrid"], "learned_range has no effect on samples by ddim"),
    ],
)
def test_an_option_without_effect_is_said(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = write_spec(tmp_path / "spec.yaml")
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        spec = load_spec(path, overrides)
    assert len(caught) == 1
    assert parse_spec(yaml.safe_load(dump_spec(spec))) == spec


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.classes=10", "train.label_dropout=0.2"],
        ["model.head_channels=8", "model.mid_attention=true"],
        ["train.ema_profiles=[0.05, 0.1]", "train.ema_snapshot_every=64"],
        ["diffusion.variance=large", "sample.sampler=ancestral"],
    ],
)
def test_an_option_with_an_effect_is_not(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "recorded.yaml"
    path.write_text(dump_spec(load_spec(write_spec(tmp_path / "spec.yaml"), overrides)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_spec(path)


def test_missing_field_missing_file_and_no_yaml(tmp_path: Path) -> None:
    fields = tiny_fields()
    del fields["train"]["images"]
    with pytest.raises(UserError, match=r"train\.images: this field is required"):
        parse_spec(fields)
    with pytest.raises(UserError, match="no such spec file"):
        load_spec(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_spec(bad)
    bad.write_text("- 1")
    with pytest.raises(UserError, match="mapping of fields"):
        load_spec(bad)


def test_override_reaches_a_nested_field_and_reads_numbers_as_yaml_1_2(tmp_path: Path) -> None:
    path = write_spec(tmp_path / "spec.yaml")
    spec = load_spec(path, ["train.learning_rate=1e-4", "diffusion.schedule={kind: cosine, s: 0.01}"])
    assert spec.train.learning_rate == 1e-4
    assert spec.diffusion.schedule.model_dump() == {"kind": "cosine", "s": 0.01}


def test_a_new_kind_drops_the_other_kind_s_fields_and_says_so(tmp_path: Path) -> None:
    path = write_spec(tmp_path / "spec.yaml", diffusion__schedule={"kind": "linear", "beta_end": 0.01})
    with pytest.warns(UserWarning, match="beta_end belonged to the other kind and is dropped"):
        spec = load_spec(path, ["diffusion.schedule.kind=cosine"])
    assert spec.diffusion.schedule.model_dump() == {"kind": "cosine", "s": 0.008}


def test_relative_paths_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_spec(
        tmp_path / "spec.yaml", data__source="pictures", storage="store", tracking={"uri": "sqlite:///t.db"}
    )
    monkeypatch.chdir(tmp_path)
    spec = load_spec(path)
    assert spec.data.source == str(tmp_path / "pictures")
    assert spec.storage == str(tmp_path / "store")
    assert spec.tracking.uri == f"sqlite:///{tmp_path / 't.db'}"
    assert load_spec(path, resolve=False).storage == "store"


def test_identity_of_training_leaves_out_where_and_how_long() -> None:
    same = tiny_spec(train__workers=2, train__images=6400, train__checkpoint_every=7, sample__n=5, name="other")
    assert same.training_fields() == tiny_spec().training_fields()
    for other in (
        tiny_spec(seed=8),
        tiny_spec(train__threads=2),
        tiny_spec(train__slots=8),
        tiny_spec(diffusion__predict="v"),
        tiny_spec(data__flip=True),
    ):
        assert other.training_fields() != tiny_spec().training_fields()


def test_mistakes_of_yaml_are_told_by_their_place(tmp_path: Path) -> None:
    for text, told in (
        ("name: a\nseed: 1\nseed: 2\n", "line 3, column 1: seed is there twice"),
        ("name: a\ndata:\n  source: x\n  source: y\n", "line 4, column 3: source is there twice"),
        ("name: a\n data: [\n", "line 2, column 6: "),
    ):
        (tmp_path / "spec.yaml").write_text(text)
        with pytest.raises(UserError, match=f"spec.yaml: not valid YAML: {told}"):
            load_spec(tmp_path / "spec.yaml")
    with pytest.raises(UserError, match="is a folder; name a spec file"):
        load_spec(tmp_path)
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\n1: d\n'1': e\n") == {
        "a": {"b": 1},
        "c": {"b": 2},
        1: "d",
        "1": "e",
    }


def test_keeping_more_checkpoints_makes_no_other_run() -> None:
    assert tiny_spec(train__keep_every=10).training_fields() == tiny_spec().training_fields()
    every = tiny_spec().train.checkpoint_every
    assert without_effect(tiny_spec(train__keep_every=2 * every)) == []
    (line,) = without_effect(tiny_spec(train__keep_every=every + 1))
    assert f"at multiples of {every * (every + 1)} are kept" in line
