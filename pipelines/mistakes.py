"""What pydantic found wrong with a spec, as one line that names the field and the fix."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

import pydantic

_SHOWN = 60
"""Most characters of a wrong value that are quoted."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """What was meant, most likely; None where nothing is near."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def explain(error: pydantic.ValidationError, root: type[pydantic.BaseModel]) -> str:
    """The first mistake that matters: an unknown field often makes a required one missing too, so it goes first."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, section = _walk(problem["loc"], root)
    field = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = list(section.model_fields) if section else []
        # Here or one of the whole: `train.seed` is often written for `seed`.
        near = nearest(path[-1], [*known, *root.model_fields])
        here = path[:-1] if near in known else []
        return f"unknown field {field}: " + (
            f"did you mean {'.'.join([*here, near])}?" if near else f"fields here: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"{field}: this field is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        return _unknown_choice(field, problem)
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{field}: fields are needed here (name: value), not {_quoted(problem['input'])}"
    if problem["type"] == "string_pattern_mismatch":
        allowed = "letters, digits, _ . and - may be in it, the first a letter or digit"
        return f"{field}: {allowed}; not {_quoted(problem['input'])}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}: {message}, not {_quoted(problem['input'])}"


def _unknown_choice(field: str, problem: Any) -> str:
    """A word that is none of the choices; of a union, its discriminator's."""
    context, given = problem["ctx"], problem["input"]
    if problem["type"] == "union_tag_invalid":
        discriminator = context["discriminator"].strip("'")
        field, given, choices = f"{field}.{discriminator}", context["tag"], context["expected_tags"]
    else:
        choices = context["expected"].replace(" or ", ", ")
    known = [word.strip().strip("'") for word in choices.split(",")]
    near = nearest(str(given), known)
    hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
    return f"{field}: there is no {_quoted(given)}: {hint}"


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _walk(location: tuple[Any, ...], root: type[pydantic.BaseModel]) -> tuple[list[str], Any]:
    """The dotted path that the user wrote, without the tags that pydantic adds for unions, and the section it is in."""
    path: list[str] = []
    choices: list[Any] = [root]
    section: Any = root
    for part in location:
        tagged = [model for model in choices if len(choices) > 1 and _tag(model) == part]
        if tagged:
            choices, section = tagged, tagged[0]
            continue
        section = choices[0] if len(choices) == 1 else None
        path.append(str(part))
        field = section.model_fields.get(part) if section is not None else None
        choices = _sections(field.annotation) if field is not None else []
    return path, section


def _sections(annotation: Any) -> list[Any]:
    """The sections that a field may hold: more than one for a union."""
    if get_origin(annotation) is None:
        is_section = isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
        return [annotation] if is_section else []
    return [section for choice in get_args(annotation) for section in _sections(choice)]


def _tag(section: Any) -> str | None:
    kind = section.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind is not None else None
