"""The registered model as an MLflow pyfunc, from code: one row a seed in, one image a seed out.

MLflow runs this file when somebody loads the model through `mlflow.pyfunc`. It builds the network from the stored
config and loads safetensors; nothing is unpickled. (`ddpm` itself never runs it: it reads weights and config.)
"""

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc.model import PythonModel


class Sampler(PythonModel):
    """Images of the model's own size, uint8 [N, H, W, C], image i from seed i."""

    def load_context(self, context: Any) -> None:
        import json
        from pathlib import Path

        from pipelines.models import Model

        config = json.loads(Path(context.artifacts["config"]).read_text())
        self._model = Model.from_config(config, Path(context.artifacts["weights"]).read_bytes(), "registered model")

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        from ddpm_core import sample
        from pipelines.data.pixels import to_pixels

        spec = self._model.spec
        process, unet = self._model.build()
        shape = (spec.data.channels, spec.data.image_size, spec.data.image_size)
        seeds = [int(seed) for seed in model_input["seed"]]
        images = sample(
            process, unet, shape=shape, seeds=seeds, sampler=spec.sample.sampler, steps=spec.sample.steps,
            eta=spec.sample.eta, spacing=spec.sample.spacing,
        )  # fmt: skip
        return to_pixels(images)


mlflow.models.set_model(Sampler())
