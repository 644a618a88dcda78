"""Which images a score is taken from."""

import numpy as np

from pipelines.evaluate.job import choose_images


def test_images_of_a_dataset_sorted_by_class_are_drawn_from_all_of_them() -> None:
    classes = np.repeat(np.arange(4), 50)
    chosen = choose_images(200, 40, seed=0)
    assert np.bincount(classes[chosen]).min() >= 4
    assert len(set(chosen.tolist())) == 40
    assert np.array_equal(chosen, choose_images(200, 40, seed=0))
    assert not np.array_equal(chosen, choose_images(200, 40, seed=1))
    assert np.array_equal(choose_images(200, 999, seed=0), np.arange(200))
