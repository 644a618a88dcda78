"""Plain fields of a spec, before they are validated: YAML text, dotted overrides, paths."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError, one_line


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 does."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if seen.setdefault((key.tag, key.value), key) is not key:  # of two, YAML's own rule takes the last
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text."""
    return yaml.load(text, Loader=_Loader)


def what_is_wrong(error: yaml.YAMLError) -> str:
    """A mistake in a YAML text, in one line, with its place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"


def apply_overrides(fields: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Fields with each `a.b=c` set."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"--set {override}: write it as field.name=value")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: the value is not valid YAML") from None
        before, fields = fields, set_field(fields, name, value)
        _warn_of_dropped(before, fields, name)
    return fields


def _warn_of_dropped(before: Any, after: Any, name: str) -> None:
    for part in name.split(".")[:-1]:
        before, after = before.get(part) if isinstance(before, dict) else None, after[part]
    dropped = sorted(set(before) - set(after)) if isinstance(before, dict) else []
    if dropped:
        warnings.warn(f"--set {name}: {', '.join(dropped)} belonged to the other kind and is dropped", stacklevel=3)


def set_field(fields: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of nested fields with the dotted one set; a new `kind` starts from that kind's own defaults."""
    head, _, rest = name.partition(".")
    if not rest:
        if head == "kind" and fields.get("kind", value) != value:
            return {"kind": value}
        return {**fields, head: value}
    below = fields.get(head)
    return {**fields, head: set_field(below if isinstance(below, dict) else {}, rest, value)}


_REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@[A-Za-z0-9_-]+")


def is_registered(text: str) -> bool:
    """Whether it is a registered model's NAME@VERSION or NAME@ALIAS, and nothing of that name is on disk."""
    return _REGISTERED.fullmatch(text) is not None and not Path(text).exists()


def absolute_uri(uri: str) -> str:
    """A tracking URI whose sqlite file, if it is one, has an absolute path."""
    scheme = "sqlite:///"
    if not uri.startswith(scheme) or uri.startswith(scheme + "/"):
        return uri
    return scheme + str(Path(uri.removeprefix(scheme)).absolute())
