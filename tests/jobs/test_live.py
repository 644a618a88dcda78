"""What a log shows."""

import warnings

import pytest

from jobs.live import LogLines


def test_a_warning_of_ours_is_a_line_of_the_log_and_a_librarys_note_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with LogLines() as log:
        log.start("train", "2 workers start")
        warnings.warn("too little light", stacklevel=1)
        warnings.warn("for developers", RuntimeWarning, stacklevel=1)
    said = capsys.readouterr().err
    assert "warning: too little light" in said
    assert "developers" not in said
    assert "train: 2 workers start" in said
