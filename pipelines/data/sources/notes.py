"""What lies beside an image of a WebDataset, and what it says of the image's label: the one rule of all who read it.

`KEY.cls` is a whole number and nothing else, so it has the first word; of `KEY.json` it is the field `label`, and
`class` names it. NO_LABEL (-1) says that there is none, and so does a JSON without the field, a caption say.
"""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from pipelines.data.sources.base import MAX_CLASSES, NO_LABEL

ENDINGS = ("cls", "json")
NOTE_BYTES = 2**20
"""A larger note is not looked at."""

_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)", re.DOTALL)


class Label(NamedTuple):
    """What the notes of one image say."""

    number: int
    """NO_LABEL where they say none."""
    name: str | None = None
    """Of its class, where that is said."""
    passed_over: bool = False
    """Whether something that is said of the label does not count: no whole number and the only word, or another
    number than the first."""


class LabelError(ValueError):
    """A label is a whole number and can be none; `ending` is that of its note."""

    def __init__(self, ending: str, number: int) -> None:
        super().__init__(f"has the label {number}, which is not from 0 to {MAX_CLASSES - 1}; correct it")
        self.ending = ending


def sample_key(name: str) -> tuple[str, str] | None:
    """A member's key and ending by the rule of WebDataset, the name up to the first dot after its last slash and the
    rest of it in lower case; None for what belongs to no sample."""
    match = _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def read_label(notes: Mapping[str, bytes | None]) -> Label:
    """The label of an image by its notes, bytes by ending; None for one that is too large to be looked at.

    LabelError where it is below NO_LABEL or MAX_CLASSES and more.
    """
    number, name, unread, differs = NO_LABEL, None, False, False
    for ending in ENDINGS:
        if ending not in notes:
            continue
        try:
            said, called = _said(ending, notes[ending])
        except (ValueError, RecursionError):
            unread = True
            continue
        if number == NO_LABEL:
            if not NO_LABEL <= said < MAX_CLASSES:
                raise LabelError(ending, said)
            number, name = said, called
        elif said in (NO_LABEL, number):
            name = called
        else:
            differs = True
    return Label(NO_LABEL, passed_over=unread) if number == NO_LABEL else Label(number, name, differs)


def _said(ending: str, data: bytes | None) -> tuple[int, str | None]:
    """Label and name of its class by one note. ValueError where there is something else."""
    if data is None:
        raise ValueError("too large to be looked at")
    if ending == "cls":
        return int(data), None
    note = json.loads(data)
    if not isinstance(note, dict) or note.get("label") is None:
        return NO_LABEL, _text(note)
    if type(note["label"]) is not int:
        raise ValueError("no whole number")
    return note["label"], _text(note)


def _text(note: object) -> str | None:
    called = note.get("class") if isinstance(note, dict) else None
    return called if isinstance(called, str) else None
