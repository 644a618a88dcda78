"""The registered model as an MLflow pyfunc, from code: one row a seed in, one image a seed out.

MLflow runs this file when somebody loads the model through `mlflow.pyfunc`. It builds the network from the stored
config and loads safetensors; nothing is unpickled. (`ddpm` itself never runs it: it reads weights and config.)
"""

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc.model import PythonModel


class Sampler(PythonModel):
    """Images of the model's own size, uint8 [N, H, W, C], one a seed; of a model with classes, a seed's class is the
    seed modulo their number."""

    def load_context(self, context: Any) -> None:
        import json
        from pathlib import Path

        from pipelines.models import Model

        config = json.loads(Path(context.artifacts["config"]).read_text())
        self._model = Model.from_config(config, Path(context.artifacts["weights"]).read_bytes(), "registered model")

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        from pipelines.data.pixels import to_pixels
        from pipelines.drawing import Settings, draw

        spec = self._model.spec
        process, unet = self._model.build()
        seeds = [int(seed) for seed in model_input["seed"]]
        settings = Settings.of(spec.sample.model_copy(update={"labels": "uniform", "resources": {}}))
        return to_pixels(draw(process, unet, spec.data.image_size, settings, indices=seeds, seeds=seeds))


mlflow.models.set_model(Sampler())
