"""The learning rate, on the one clock there is."""

import math

from pipelines.sections import Train


def learning_rate(train: Train, images: int) -> float:
    """Of the step that follows after so many images: it rises over the warm-up, then stays or falls as a cosine."""
    done = images + train.global_batch
    if done < train.warmup_images:
        return train.learning_rate * (done / train.warmup_images)
    if train.decay == "constant":
        return train.learning_rate
    # The last step still moves: 0 comes a batch after it.
    span = train.total_steps * train.global_batch + train.global_batch - train.warmup_images
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - train.warmup_images) / span))
