"""InceptionV3 as Frechet distances of the literature are taken in, from a weights file that the user names.

Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision", with what the network published by
Heusel et al. 2017 does otherwise: its average pools leave out the border, and the last block pools by maximum. The
weights are those of `pt_inception-2015-12-05` (pytorch-fid and torch-fidelity read the same file), as safetensors or as
a file of `torch.save`, which is read by torch's loader for weights alone. Images are resized to 299 as TensorFlow 1
does it, from corner to corner of the pixels' own grid, and grey ones have their channel three times.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from pipelines.errors import UserError, one_line
from pipelines.store import sha256

WIDTH = 2048
SIDE = 299
PREPROCESSING = "uint8, bilinear to 299 x 299 as TensorFlow 1, (x - 128) / 128"


class Inception:
    """The features of the last pooling layer, [N, 2048]."""

    preprocessing = PREPROCESSING

    def __init__(self, network: "InceptionV3", digest: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.digest = digest
        """sha256 of the weights' file."""

    @staticmethod
    def load(path: str) -> "Inception":
        """From a weights file. UserError where it is none."""
        data = _read(path)
        network = InceptionV3()
        try:
            weights = _weights(data)
            # Counts of batches, which nothing depends on, are in some of the files.
            network.load_state_dict({n: w for n, w in weights.items() if not n.endswith("num_batches_tracked")})
        except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"evaluate.inception: {path} has not the weights of InceptionV3 for Frechet distances, such as "
                f"pt_inception-2015-12-05-6726825d.pth ({one_line(error)})"
            ) from None
        return Inception(network, sha256(data))

    def features(self, images: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float64]:
        """uint8 [N, H, W, 1 or 3] -> float64 [N, 2048]."""
        out = np.empty((len(images), WIDTH))
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                pixels = torch.from_numpy(images[start : start + batch].astype(np.float32)).permute(0, 3, 1, 2)
                x = (resize(pixels.expand(-1, 3, -1, -1)) - 128) / 128
                out[start : start + batch] = self._network(x).double().numpy()
        return out


def file_digest(path: str) -> str:
    """sha256 of a weights file. UserError where it cannot be read."""
    return sha256(_read(path))


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"evaluate.inception: {path} cannot be read ({one_line(error)})") from None


def _weights(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError:
        import io
        import pickle

        try:
            return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, EOFError, KeyError) as error:
            raise ValueError(one_line(error)) from None


def resize(x: Tensor) -> Tensor:
    """Images [N, C, H, W] to 299 x 299: pixel i of the result lies at i * H / 299 of the source."""
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(SIDE, dtype=torch.float32) * (size / SIDE)
        low = at.floor().long()
        high = (low + 1).clamp(max=size - 1)
        weight = (at - low).view(-1, 1) if axis == 2 else at - low
        before, after = x.index_select(axis, low), x.index_select(axis, high)
        x = before + (after - before) * weight
    return x


class _Convolution(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, size: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.utils.skip_init(nn.Conv2d, fan_in, fan_out, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(fan_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, fan_in: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(fan_in, 64, 1)
        self.branch5x5_1 = _Convolution(fan_in, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(fan_in, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(fan_in, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(fan_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(fan_in, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        wide: dict[str, Any] = {"size": (1, 7), "padding": (0, 3)}
        high: dict[str, Any] = {"size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Convolution(fan_in, 192, 1)
        self.branch7x7_1 = _Convolution(fan_in, width, 1)
        self.branch7x7_2 = _Convolution(width, width, **wide)
        self.branch7x7_3 = _Convolution(width, 192, **high)
        self.branch7x7dbl_1 = _Convolution(fan_in, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, **high)
        self.branch7x7dbl_3 = _Convolution(width, width, **wide)
        self.branch7x7dbl_4 = _Convolution(width, width, **high)
        self.branch7x7dbl_5 = _Convolution(width, 192, **wide)
        self.branch_pool = _Convolution(fan_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, fan_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(fan_in, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(fan_in, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    def __init__(self, fan_in: int, by_maximum: bool) -> None:
        super().__init__()
        self._by_maximum = by_maximum
        self.branch1x1 = _Convolution(fan_in, 320, 1)
        self.branch3x3_1 = _Convolution(fan_in, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(fan_in, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(fan_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self._by_maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """The network; its weights are not initialised. Names are those of the published file."""

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            Conv2d_1a_3x3=_Convolution(3, 32, 3, stride=2),
            Conv2d_2a_3x3=_Convolution(32, 32, 3),
            Conv2d_2b_3x3=_Convolution(32, 64, 3, padding=1),
            MaxPool_1=nn.MaxPool2d(3, stride=2),
            Conv2d_3b_1x1=_Convolution(64, 80, 1),
            Conv2d_4a_3x3=_Convolution(80, 192, 3),
            MaxPool_2=nn.MaxPool2d(3, stride=2),
            Mixed_5b=_BlockA(192, 32),
            Mixed_5c=_BlockA(256, 64),
            Mixed_5d=_BlockA(288, 64),
            Mixed_6a=_BlockB(288),
            Mixed_6b=_BlockC(768, 128),
            Mixed_6c=_BlockC(768, 160),
            Mixed_6d=_BlockC(768, 160),
            Mixed_6e=_BlockC(768, 192),
            Mixed_7a=_BlockD(768),
            Mixed_7b=_BlockE(1280, by_maximum=False),
            Mixed_7c=_BlockE(2048, by_maximum=True),
        )
        self._order = list(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.fc = nn.utils.skip_init(nn.Linear, WIDTH, 1008)  # in the file, and not used

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 299, 299] -> [N, 2048]."""
        for name in self._order:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))
