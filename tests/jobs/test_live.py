"""What a log shows."""

import time
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


def test_a_rate_is_that_of_what_is_counted_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for images goes fast, drawing them slowly: the time left is not made of both."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with LogLines() as log:
        log.start("sample")
        for done, unit in (
            (100, "images looked for"),
            (1000, "images looked for"),
            (100, "images"),
            (120, "images"),
            (121, "images"),
        ):
            now[0] += 20
            log.advance(done, 1000, unit)
    said = capsys.readouterr().err.splitlines()
    assert "1,000/1,000 images looked for, 45 images looked for/s, 0 s left" in said[2]
    assert said[3].endswith("100/1,000 images")
    assert said[4].endswith("120/1,000 images, 1 images/s, 880 s left")
    assert said[5].endswith("121/1,000 images, 0.53 images/s, 1674 s left")
