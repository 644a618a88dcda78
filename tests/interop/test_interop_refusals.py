"""What cannot be read or written is refused by name, and leaves nothing behind."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from ddpm_core import NoiseSchedule
from pipelines.errors import UserError
from pipelines.interop import folder as interop_folder
from pipelines.interop import read_diffusers, write_diffusers
from pipelines.store import Place
from tests.interop.interop_helpers import DIGITS, WEIGHTS, draw, portable, saved, theirs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers writes it, not to be changed."""
    return saved(tmp_path_factory.mktemp("interop") / "theirs", theirs(**DIGITS))


@pytest.fixture
def broken(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(written, tmp_path / "broken"))


UNET, INDEX, SCHED = "unet/config.json", "model_index.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (INDEX, {"_class_name": "LDMPipeline"}, "_class_name: LDMPipeline cannot be read, only DDPMPipeline and DDIMP"),
        (
            INDEX,
            {"unet": ["diffusers", "UNet1DModel"]},
            r"unet: diffusers\.UNet1DModel cannot .* diffusers\.UNet2DModel",
        ),
        (INDEX, {"unet": ["elsewhere", "UNet2DModel"]}, r"unet: elsewhere\.UNet2DModel cannot be read"),
        (INDEX, {"scheduler": ["diffusers", "PNDMScheduler"]}, r"scheduler: diffusers\.PNDMScheduler cannot be read"),
        (INDEX, {"scheduler": "DDPMScheduler"}, "scheduler: DDPMScheduler cannot be read"),
        (INDEX, {"vqvae": ["diffusers", "VQModel"]}, "vqvae: is not known here, a DDPMPipeline has unet and scheduler"),
        (UNET, {"_class_name": "UNet2DConditionModel"}, "_class_name: 'UNet2DConditionModel' cannot be honoured"),
        (
            UNET,
            {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
            "down_block_types: 'SkipDownBlock2D' cannot be honoured .input should be 'DownBlock2D'",
        ),
        (UNET, {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types: 'CrossAttnUpBlock2D' cannot"),
        (UNET, {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types: attention must be at the levels"),
        (UNET, {"up_block_types": ["UpBlock2D"]}, "up_block_types must be of the same length"),
        (UNET, {"mid_block_type": None}, "mid_block_type: None cannot be honoured"),
        (UNET, {"mid_block_scale_factor": 1.41}, r"mid_block_scale_factor: 1\.41 cannot"),
        (UNET, {"act_fn": "mish"}, "act_fn: 'mish' cannot be honoured"),
        (UNET, {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift: 'scale_shift' cannot"),
        (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier' cannot"),
        (UNET, {"time_embedding_dim": 100}, "time_embedding_dim: must be four times"),
        (UNET, {"center_input_sample": True}, "center_input_sample: True cannot"),
        (UNET, {"downsample_type": "resnet"}, "downsample_type: 'resnet' cannot"),
        (UNET, {"upsample_type": "resnet"}, "upsample_type: 'resnet' cannot"),
        (UNET, {"downsample_padding": 2}, "downsample_padding: 2 cannot"),
        (UNET, {"attn_norm_num_groups": 16}, "attn_norm_num_groups: must be norm_num_groups"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type: 'timestep' cannot"),
        (UNET, {"out_channels": 3}, r"out_channels: must be in_channels \(1\) or twice"),
        (UNET, {"sample_size": None}, "sample_size: None cannot"),
        (UNET, {"sample_size": [8, 16]}, "sample_size: images must be square"),
        (UNET, {"norm_num_groups": 24}, r"config\.json: groups \(24\) must divide"),
        (UNET, {"novelty": 3}, "novelty: a setting that is not known here"),
        (UNET, {"num_class_embeds": 4, "null_class": 3}, "null_class: a setting that is not known here"),
        (SCHED, {"_class_name": "PNDMScheduler"}, "_class_name: 'PNDMScheduler' cannot"),
        (SCHED, {"beta_schedule": "laplace"}, "beta_schedule: 'laplace' cannot"),
        (SCHED, {"trained_betas": [0.1, 0.2]}, r"trained_betas: num_train_timesteps \(1000\) are needed"),
        (SCHED, {"beta_end": 1.5}, "beta must lie strictly between 0 and 1"),
        (SCHED, {"variance_type": "learned"}, "variance_type: 'learned' cannot"),
        (SCHED, {"variance_type": "fixed_large_log"}, "variance_type: 'fixed_large_log' cannot"),
        (SCHED, {"variance_type": "learned_range"}, "variance_type: learned_range does not go with a network of 1"),
        (SCHED, {"prediction_type": "flow"}, "prediction_type: 'flow' cannot"),
        (SCHED, {"thresholding": True}, r"sample_max_value: 1\.0 caps the threshold"),
        (SCHED, {"clip_sample_range": 2.0}, r"clip_sample_range: 2\.0 cannot"),
        (SCHED, {"steps_offset": 1}, "steps_offset: 1 cannot"),
        (SCHED, {"rescale_betas_zero_snr": True}, "eps says nothing about x0"),
        (SCHED, {"set_alpha_to_one": False}, "set_alpha_to_one: False cannot"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(broken: Path, file: str, fields: dict[str, Any], said: str) -> None:
    path = broken / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=said) as caught:
        read_diffusers(broken)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[1]", "holds no fields"), (None, "cannot be read")])
def test_a_damaged_config_is_refused(broken: Path, text: str | None, said: str) -> None:
    (broken / UNET).unlink()
    if text:
        (broken / UNET).write_text(text)
    with pytest.raises(UserError, match=f"{UNET}: {said}"):
        read_diffusers(broken)


def test_a_pickle_is_refused_and_not_run(broken: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (broken / WEIGHTS).unlink()
    with pytest.raises(UserError, match="there is no such file"):
        read_diffusers(broken)
    (broken / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"\.bin: a pickle can run .* convert it .*save_pretrained") as caught:
        read_diffusers(broken)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_in.weight": None}, "the tensor conv_in.weight is missing"),
        ({"extra.weight": torch.zeros(1)}, "the tensor extra.weight is there, but not in the network"),
        ({"conv_in.bias": torch.zeros(3)}, r"the tensor conv_in.bias is torch.float32 \[3\], but .* \[32\]"),
        ({"conv_in.bias": torch.zeros(32, dtype=torch.int8)}, "the tensor conv_in.bias is torch.int8"),
    ],
)
def test_weights_of_another_network_are_refused(broken: Path, change: dict[str, Tensor | None], said: str) -> None:
    changed = safetensors.torch.load_file(broken / WEIGHTS) | change
    safetensors.torch.save_file({k: v for k, v in changed.items() if v is not None}, broken / WEIGHTS)
    with pytest.raises(UserError, match=said):
        read_diffusers(broken)


def test_a_tensor_under_both_its_names_is_refused(broken: Path) -> None:
    saved(broken, theirs(**DIGITS | {"add_attention": True}))
    given = safetensors.torch.load_file(broken / WEIGHTS)
    name = "mid_block.attentions.0.to_q.weight"
    safetensors.torch.save_file({**given, name.replace("to_q", "query"): 2 * given[name]}, broken / WEIGHTS)
    with pytest.raises(UserError, match=f"the tensor {name} is there twice"):
        read_diffusers(broken)


def test_a_torn_weights_file_is_refused(broken: Path) -> None:
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_diffusers(broken)


SHARDS = f"{WEIGHTS}.index.json"


def test_weights_in_shards_are_read(broken: Path) -> None:
    whole = read_diffusers(broken).weights
    unet = UNet2DModel.from_pretrained(broken / "unet")
    (broken / WEIGHTS).unlink()
    unet.save_pretrained(broken / "unet", max_shard_size="100KB")
    assert len(list(broken.glob("unet/*-of-*.safetensors"))) > 2
    read = read_diffusers(broken).weights
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("placed", "said"),
    [
        (None, "weight_map: must say in which file"),
        (
            {"conv_in.bias": "../weights.safetensors"},
            "'../weights.safetensors' is no safetensors file beside the index",
        ),
        ({"conv_in.bias": "/weights.safetensors"}, "'/weights.safetensors' is no safetensors file beside the index"),
        ({"conv_in.bias": "weights.bin"}, "'weights.bin' is no safetensors file beside the index"),
        ({"conv_in.bias": "absent.safetensors"}, r"absent\.safetensors: there is no such file"),
        (
            {"conv_in.bias": "a.safetensors"},
            r"a\.safetensors: the tensor conv_in\.weight is there, but not by the index",
        ),
        (
            {"conv_in.bias": "a.safetensors", "conv_in.weight": "a.safetensors", "more": "a.safetensors"},
            r"a\.safetensors: the tensor more is missing",
        ),
        (
            {"conv_in.bias": "a.safetensors", "conv_in.weight": "a.safetensors"},
            r"index\.json: the tensor .* is missing",
        ),
    ],
)
def test_an_index_of_shards_that_is_not_theirs_is_refused(broken: Path, placed: Any, said: str) -> None:
    given = safetensors.torch.load_file(broken / WEIGHTS)
    for folder in (broken, broken / "unet"):  # one that could be read, outside
        safetensors.torch.save_file({"conv_in.bias": given["conv_in.bias"]}, folder / "weights.safetensors")
    two = {name: given[name] for name in ("conv_in.bias", "conv_in.weight")}
    safetensors.torch.save_file(two, broken / "unet/a.safetensors")
    (broken / SHARDS).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UserError, match=said):
        read_diffusers(broken)


def test_half_precision_weights_are_read_as_float32(broken: Path) -> None:
    halves = {name: value.half() for name, value in safetensors.torch.load_file(broken / WEIGHTS).items()}
    safetensors.torch.save_file(halves, broken / WEIGHTS)
    weights = read_diffusers(broken).weights
    assert torch.equal(weights["conv_in.weight"], halves["conv_in.weight"].float())


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot say mean, only eps, x0, v"):
        write_diffusers(portable(predict="mean"), tmp_path / "out")
    with pytest.raises(UserError, match="not a respaced one"):
        write_diffusers(portable(schedule=NoiseSchedule.linear().respace(10)), tmp_path / "out")
    with pytest.raises(UserError, match=r"alpha_bar from t = 50 on is 0 in float32, .*predict eps .*; predict v or x0"):
        write_diffusers(portable(schedule=NOTHING_AT_T), tmp_path / "out")
    with pytest.raises(UserError, match=r"alpha_bar from t = 3\d on is 0 in float32, .*predict v .*; keep more signal"):
        write_diffusers(portable(predict="v", schedule=NOTHING_LONG_BEFORE), tmp_path / "out")
    assert os.listdir(tmp_path) == []


NOTHING_AT_T = NoiseSchedule.from_rates(50, 1e-25, 0.99)
NOTHING_LONG_BEFORE = NoiseSchedule.from_alpha_bars(torch.logspace(-0.01, -60, 50, dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "prediction", "is_drawn"),
    [
        (NOTHING_AT_T, "epsilon", False),
        (NOTHING_AT_T, "v_prediction", True),
        (NOTHING_AT_T, "sample", True),
        (NOTHING_LONG_BEFORE, "v_prediction", False),
        (NOTHING_LONG_BEFORE, "sample", False),
    ],
)
def test_diffusers_draws_nan_just_where_an_export_is_refused(
    schedule: NoiseSchedule, prediction: str, is_drawn: bool, tmp_path: Path
) -> None:
    scheduler = DDPMScheduler(
        50,
        trained_betas=schedule.beta.tolist(),
        prediction_type=prediction,
        clip_sample=False,
        variance_type="fixed_large",
    )
    scheduler.set_timesteps(50)
    x = draw(2, 1, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * draw(2, 1, 8, 8), t, x).prev_sample
    assert bool(x.isfinite().all()) == is_drawn
    predict = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[prediction]
    given = portable(predict=predict, schedule=schedule, clip_x0=False)
    if is_drawn:
        write_diffusers(given, tmp_path / "out")
    else:
        with pytest.raises(UserError, match="would draw NaN"):
            write_diffusers(given, tmp_path / "out")


def test_a_place_that_is_taken_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/letter.txt").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken/letter.txt"):
        with pytest.raises(UserError, match="is there already and no empty folder"):
            write_diffusers(portable(), out)
    with pytest.raises(UserError, match="cannot be written"):
        write_diffusers(portable(), tmp_path / "taken/letter.txt/below")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["taken", "taken/letter.txt"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Place):
        def write(self, data: bytes) -> None:
            if self.name == interop_folder.INDEX:
                raise OSError(28, "No space left on device")
            super().write(data)

    monkeypatch.setattr(interop_folder, "Place", Full)
    with pytest.raises(UserError, match="No space left on device"):
        write_diffusers(portable(), tmp_path / "out")
    assert os.listdir(tmp_path) == []
