"""The head of a cluster, seen from a client: its address, the token that it asks for, a client of its Jobs API.

The token travels in a header of each request. Ray's own way (RAY_AUTH_MODE in the environment) is read once a process
and would make every later `ray.init` of this process ask for a token too.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import UserError

_PROBE_SECONDS = 10
_TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""They override the address that JobSubmissionClient is given."""
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")


@contextlib.contextmanager
def connected(address: str, say: Callable[[str], None]) -> Iterator[Any]:
    """A JobSubmissionClient of the head at `address`, whose library logs nothing below a warning in the block.

    UserError where no Ray head answers there, or where it asks for a token and none, or a wrong one, is at hand.
    """
    client = _client(address, say)
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield client
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def checked_address(address: str) -> str:
    """The address without a trailing slash. UserError where it is not http(s)://HOST:PORT."""
    plain = address.rstrip("/")
    try:
        parts = urlsplit(plain)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        whole = False
    if not whole or plain != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc:
        raise UserError(f"--to {address}: write it as http://HOST:PORT, the dashboard's address of a Ray head")
    return plain


def find_token() -> str | None:
    """The client's token, looked for where Ray looks, in its order. UserError where a named file cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if named is None and isinstance(error, FileNotFoundError):
            return None
        reason = getattr(error, "strerror", None) or "not text"
        source = "RAY_AUTH_TOKEN_PATH" if named else "the Ray token"
        raise UserError(f"{source}: cannot read {path} ({reason}): the head asks for a token") from None


def _client(address: str, say: Callable[[str], None]) -> Any:
    headers = {}
    if _asks_for_token(address):
        token = find_token()
        if token is None:
            raise UserError(f"--to {address}: the head asks for a token: put it in {_TOKEN_PLACES}")
        headers["Authorization"] = f"Bearer {token}"
    else:
        say(f"warning: the head at {address} asks for no token, so whoever reaches it can run code on it")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _unset(_ADDRESS_VARIABLES):
            return JobSubmissionClient(address, headers=headers)
    except AuthenticationError:
        raise UserError(
            f"--to {address}: the head asks for a token and refuses this one: put its own in {_TOKEN_PLACES}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"--to {address}: no Jobs API answers there ({_one_line(error)})") from None


def _asks_for_token(address: str) -> bool:
    """What the head says about itself; this one question needs no token."""
    import requests

    try:
        answer = requests.get(f"{address}/api/authentication_mode", timeout=_PROBE_SECONDS)
        if answer.status_code in (401, 403):  # a gate in front of the head
            return True
        return bool(answer.json()["authentication_mode"] != "disabled")
    except (requests.exceptions.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f"--to {address}: something else than a Ray head answers there: give the dashboard's port, "
            "8265 unless `ray start --head` was told another"
        ) from None
    except OSError as error:
        raise UserError(
            f"--to {address}: no Ray head answers there ({_reason(error)}): is it up, and reachable from here?"
        ) from None


@contextlib.contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    """Without these environment variables, put back at the end."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _reason(error: BaseException) -> str:
    """The operating system's words, from below what the HTTP libraries wrapped around them."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            return below.strerror
        nested = [a for a in (*below.args, getattr(below, "reason", None)) if isinstance(a, BaseException)]
        below = nested[0] if nested else below.__cause__
    return "timed out" if "timed out" in str(error) else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
