"""Which images a score is taken from."""

import numpy as np

from pipelines.evaluate.job import draw_images


def test_images_of_a_dataset_sorted_by_class_are_drawn_from_all_of_them() -> None:
    images = np.repeat(np.arange(4, dtype=np.uint8), 50).reshape(200, 1, 1, 1)
    drawn = draw_images(images, 40, seed=0)
    assert np.bincount(drawn.ravel()).min() >= 4
    assert np.array_equal(drawn, draw_images(images, 40, seed=0))
    assert not np.array_equal(drawn, draw_images(images, 40, seed=1))
    assert len(draw_images(images, 999, seed=0)) == 200
