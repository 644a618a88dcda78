"""What a user typed is what messages name; files that are called alike stay what they are."""

import warnings

import pytest

from jobs.notices import said_as_options
from pipelines.errors import UserError


def test_fields_are_said_as_options_and_files_as_they_are_called() -> None:
    said: list[str] = []

    def work() -> None:
        with said_as_options("SOURCE", said.append):
            warnings.warn("data.held_out: has no effect, for ./data.source has a split", stacklevel=1)
            raise UserError("data.source: /x/data.zip and data.tar, data.image_size")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with pytest.raises(UserError, match=r"^SOURCE: /x/data\.zip and data\.tar, --image-size$"):
            work()
        assert warnings.showwarning is before
    assert said == ["warning: --held-out: has no effect, for ./data.source has a split"]
