"""Gates: no evidence, no promotion; and a not-a-number is not evidence."""

import math

import pytest

from pipelines.registry.promote import judge
from pipelines.spec import Gates

GATES = Gates(frechet_over_floor=2.0, feature_accuracy=0.95)


@pytest.mark.parametrize(
    ("evidence", "failed"),
    [
        ({"frechet_over_floor": 2.0, "feature_accuracy": 0.95}, set()),
        ({"frechet_over_floor": 2.01, "feature_accuracy": 0.99}, {"frechet_over_floor"}),
        ({"frechet_over_floor": 1.0, "feature_accuracy": 0.94}, {"feature_accuracy"}),
        ({"frechet_over_floor": math.nan, "feature_accuracy": math.nan}, {"frechet_over_floor", "feature_accuracy"}),
        ({"frechet_over_floor": 1.0}, {"feature_accuracy"}),
        ({"frechet_over_floor": 1.0, "noise_over_floor": 50.0}, set()),
        ({"frechet_over_floor": 1.0, "noise_over_floor": 49.0}, {"noise_over_floor"}),
        ({"frechet_over_floor": 1.0, "noise_over_floor": None}, {"noise_over_floor"}),
        ({"frechet_over_floor": 1.0, "noise_over_floor": 99.0, "feature_accuracy": 0.9}, {"feature_accuracy"}),
        ({}, {"frechet_over_floor", "feature_accuracy"}),
    ],
)
def test_verdicts(evidence: dict[str, float | None], failed: set[str]) -> None:
    verdicts = judge(evidence, GATES)
    assert {v.gate for v in verdicts if not v.passed} == failed
    assert len(verdicts) == 2
