"""What scores depend on beside the spec, the model and the data."""

from pipelines.evaluate.chance import REPLICATES
from pipelines.evaluate.extractors import SEED
from pipelines.evaluate.features import FORMAT
from pipelines.evaluate.frechet import SPLITS, WORK
from pipelines.evaluate.kernel import SUBSET, SUBSETS
from pipelines.evaluate.memory import NEAR
from pipelines.evaluate.memory import SPLITS as NEAR_SPLITS
from pipelines.evaluate.neighbours import NEIGHBOURS
from pipelines.evaluate.sets import KERNEL_SPLITS, NEIGHBOUR_PAIRS

_BITS_FORMAT = 2
"""Of the bits' interval; since 2, copies of an image count in it as one."""
_SETS_FORMAT = 2
"""Of their values and intervals; since 2, intervals have the chance of both sides in them."""

_ANSWER_FORMAT = 2
"""Of what is told beside values and intervals; since 2, provenance has `held_out_seen`, labels, threads and device."""

MEASURE = {
    "answer": _ANSWER_FORMAT,
    "bits": _BITS_FORMAT,
    "features": FORMAT,
    "feature_seed": SEED,
    "sets": _SETS_FORMAT,
    "splits": SPLITS,
    "frechet_work": WORK,
    "kernel_splits": KERNEL_SPLITS,
    "neighbour_pairs": NEIGHBOUR_PAIRS,
    "replicates": REPLICATES,
    "neighbours": NEIGHBOURS,
    "near": NEAR,
    "near_splits": NEAR_SPLITS,
    "subsets": SUBSETS,
    "subset": SUBSET,
}
"""With it in the key of what is kept, old answers are not taken for new."""
