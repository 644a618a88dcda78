"""A question about a model or images, and its answer, kept in the store's `evaluations/KEY/` with the picture of the
images that lie nearest to training images: the same question again is answered from there.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.manifest import Dataset
from pipelines.errors import UserError
from pipelines.evaluate.inception import file_digest
from pipelines.evaluate.measure import MEASURE
from pipelines.evaluate.scores import BITS_PER_DIM, Score
from pipelines.sections import Evaluate
from pipelines.session import Session
from pipelines.store import MANIFEST, DamageError, identity
from pipelines.unused import OF_BITS

_SCORES, PAIRS = "scores.json", "pairs.png"


@dataclass(frozen=True)
class Evaluation:
    """Scores with their provenance, and the figures that gates look at."""

    scores: list[Score]
    evidence: dict[str, float]
    pairs: str
    """Picture of the images that lie nearest to training images, above these."""
    images: str
    """Where the images lie; empty where they were not kept."""

    def to_json(self) -> dict[str, Any]:
        where = {"pairs": self.pairs, "images": self.images}
        return {"scores": [score.to_json() for score in self.scores], "evidence": self.evidence, **where}

    def summary(self) -> str:
        figures = self.evidence
        bits = f", {figures[BITS_PER_DIM]:.3f} bits/dim" if BITS_PER_DIM in figures else ""
        return f"Frechet {figures['frechet']:.3g} = {figures['frechet_over_floor']:.2f} floors{bits}"


@dataclass(frozen=True)
class Question:
    """What is asked of a model or of images."""

    evaluate: Evaluate
    seed: int
    """Of the scores' own chance."""

    def fields(self, bits: bool = True) -> dict[str, Any]:
        """All of it that an answer depends on, one with bits/dim or one without. UserError where the file of a network
        cannot be read."""
        others = () if bits else OF_BITS
        asked = self.evaluate.model_dump(mode="json", exclude={"keep_samples", "inception", *others})
        features = file_digest(self.evaluate.inception) if self.evaluate.inception is not None else None
        return {"evaluate": asked, "features": features, "seed": self.seed, "measure": MEASURE}


class Answer:
    """To one question about one model or set of images: kept, or to be worked out."""

    def __init__(self, asked: Mapping[str, Any], dataset: Dataset, question: Question, session: Session) -> None:
        self._store = session.store
        key = identity({**asked, "dataset": dataset.digest, **question.fields()})[:16]
        self._place = session.store / "evaluations" / key

    def known(self) -> Evaluation | None:
        """What was answered before."""
        if not (self._place / MANIFEST).exists():
            return None
        try:
            record = json.loads(self._place.read_folder(_SCORES, PAIRS)[_SCORES])
            scores = [Score.from_json(one) for one in record["scores"]]
            evidence, images = dict(record["evidence"]), str(record["images"])
        except UserError:  # of another version's manifest
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            told = error if isinstance(error, DamageError) else f"{self._place} is damaged"
            warnings.warn(f"{told}; it is scored again", stacklevel=2)
            self._place.remove()
            return None
        if images and not Path(images).is_absolute() and "://" not in images:
            images = str(self._store / images)
        return Evaluation(scores, evidence, str(self._place / PAIRS), images)

    def keep(self, scores: list[Score], evidence: dict[str, float], pairs: bytes, images: str) -> Evaluation:
        """Commit the answer, with its picture."""
        record = {
            "scores": [score.to_json() for score in scores],
            "evidence": evidence,
            "images": images.removeprefix(f"{self._store}/"),  # the store may be moved
        }
        self._place.commit_folder({_SCORES: json.dumps(record).encode(), PAIRS: pairs})
        return Evaluation(scores, evidence, str(self._place / PAIRS), images)
