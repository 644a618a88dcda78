"""Submission through the Ray Jobs API: the same spec, run by a cluster that somebody started with `ray start --head`.

The job runs this client's code: the working directory that is sent holds the resolved spec and copies of the three
packages. Its log is followed as it comes, and it ends with the exit code that the verb would have had here.
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.submit.head import checked_address, connected
from jobs.submit.host import SETUP
from jobs.submit.package import entrypoint, fill_working_dir, portable
from pipelines.errors import UserError
from pipelines.spec import Spec
from pipelines.store import identity

_STOP_SETTINGS = {
    # To be stopped is to be interrupted: the command closes its run and leaves the cluster. Ray's SIGTERM would end it
    # on the spot, with a dump of the stack, because Ray's core puts a handler of its own in place of ours.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "20",
}
_OWN_EXIT_CODES = (0, 1, 2, 3, 130)
_SILENCE_SECONDS = 60.0
"""A log that is silent for so long is asked for anew: its connection may be dead without a word."""
_PATIENCE_SECONDS = 120.0
"""How long a head may be out of reach before the client gives up following."""
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Submitted:
    """A job that ended, and how."""

    job: str
    """Its submission id."""
    address: str
    status: str
    """SUCCEEDED, FAILED or STOPPED, in Ray's words."""
    exit_code: int
    """The client's: the job's own, 130 for one that was stopped, 1 for one that was killed or never started."""
    result: dict[str, Any] | None
    """The JSON object that the verb printed, of a job that succeeded."""


def submit(
    spec: Spec,
    address: str,
    storage: str | None,
    tracking_uri: str | None,
    say: Callable[[str], None],
    verb: str = "run",
) -> Submitted:
    """Run a spec as a job of the cluster whose head answers at `address`, follow its log, return how it ended.

    `say` gets the client's own lines and those of the job's log. An interrupt stops the job too (status STOPPED, exit
    code 130). UserError before anything is sent: for an address, a token or a path that does not serve, and for a
    spec that this cluster is running already. RuntimeError where the head is lost on the way.
    """
    spec, address = portable(spec, storage, tracking_uri), checked_address(address)
    with connected(address, say) as client:
        job = _next_attempt(client, spec, address)
        _send(client, job, spec, verb, say)
        say(f"job {job} is on the cluster, its dashboard is {address}/#/jobs/{job}")
        log = Log(say)
        try:
            _follow(client, job, log)
        except KeyboardInterrupt:
            _stop(client, job, log, address, say)
            return _ended(client, job, log, address, say, interrupted=True)
        return _ended(client, job, log, address, say)


def _next_attempt(client: Any, spec: Spec, address: str) -> str:
    """A submission id that the head has not seen: Ray takes each only once. UserError while an earlier one runs."""
    prefix = f"{spec.name}-{identity(spec.model_dump(mode='json'))[:8]}"
    attempts = [0]
    for known in client.list_jobs():
        head, _, number = (known.submission_id or "").rpartition("-a")
        if head != prefix or not number.isdigit():
            continue
        if not known.status.is_terminal():
            raise UserError(
                f"job {known.submission_id} runs this spec already: wait for it, "
                f"or stop it with `{_stop_command(known.submission_id, address)}`"
            )
        attempts.append(int(number))
    return f"{prefix}-a{max(attempts) + 1}"


def _send(client: Any, job: str, spec: Spec, verb: str, say: Callable[[str], None]) -> None:
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as folder:
        size = fill_working_dir(Path(folder), spec)
        say(f"sending the spec and this installation's code, {size:,} bytes")
        # The public field worker_process_setup_hook does not reach the process that starts the job's command.
        environment = {**_STOP_SETTINGS, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP}
        try:
            client.submit_job(
                entrypoint=entrypoint(spec, verb),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={"ddpm.name": spec.name, "ddpm.verb": verb, "ddpm.storage": str(spec.storage)},
            )
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):  # the head may have taken it, or not
                client.stop_job(job)
            raise
        except RuntimeError as error:
            if "already exists" in str(error):
                raise UserError(f"job {job} was submitted by somebody else a moment ago: wait for it") from None
            raise


def _follow(client: Any, job: str, log: "Log") -> None:
    """Say the job's log until the job has ended, through lost connections. RuntimeError where the head stays away."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    trouble = (OSError, RuntimeError, TimeoutError, aiohttp.ClientError)
    lost_at: float | None = None
    while True:
        with contextlib.suppress(*trouble):  # the status tells whether the log broke off or the job ended
            asyncio.run(_tail(client, job, log))
        try:
            if client.get_job_status(job).is_terminal():
                log.take(0, client.get_job_logs(job))
                log.finish()
                return
            lost_at = None
        except AuthenticationError:
            raise RuntimeError(f"the head no longer takes the token; job {job} may go on") from None
        except trouble as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                raise RuntimeError(f"lost the head while job {job} ran, which may go on: {error}") from error
        time.sleep(_RETRY_SECONDS)


async def _tail(client: Any, job: str, log: "Log") -> None:
    loop, position = asyncio.get_running_loop(), 0
    async with asyncio.timeout(_SILENCE_SECONDS) as silence:
        async for piece in client.tail_job_logs(job):
            log.take(position, piece)
            position += len(piece)
            silence.reschedule(loop.time() + _SILENCE_SECONDS)


def _stop(client: Any, job: str, log: "Log", address: str, say: Callable[[str], None]) -> None:
    """Stop the job and see it end; a second interrupt leaves at once. KeyboardInterrupt where the head is lost."""
    say(f"interrupted: asking Ray to stop job {job}")
    try:
        client.stop_job(job)
        _follow(client, job, log)
    except (OSError, RuntimeError) as error:
        say(f"job {job} may go on ({error}): `{_stop_command(job, address)}` stops it")
        raise KeyboardInterrupt from None


def _stop_command(job: str, address: str) -> str:
    return f"ray job stop --address {address} {job}"


def _ended(
    client: Any, job: str, log: "Log", address: str, say: Callable[[str], None], interrupted: bool = False
) -> Submitted:
    info = client.get_job_info(job)
    status, own = str(info.status.value), info.driver_exit_code
    code = 130 if interrupted else exit_code_of(status, own)
    if status == "FAILED" and own is None:
        say(f"the job's command did not run to its end: {info.message}")
    elif status == "FAILED" and own not in _OWN_EXIT_CODES:
        say(f"the job's command ended with exit code {own}: killed from outside, or no `python` on the head's PATH")
    say(f"job {job}: {status}, exit code {code}")
    return Submitted(job, address, status, code, log.last_object if status == "SUCCEEDED" else None)


def exit_code_of(status: str, driver_exit_code: int | None) -> int:
    """The client's exit code: the verb's own where it ended by itself, 130 where it was stopped, else 1."""
    if status == "STOPPED":
        return 130
    return driver_exit_code if driver_exit_code in _OWN_EXIT_CODES else 1


class Log:
    """A job's log as lines, whatever pieces it comes in; what is heard twice is said once.

    A JSON object is held back until another line follows: a job's last line is its result, and not for the reader.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._heard = 0
        self._rest = ""
        self._held: str | None = None
        self.last_object: dict[str, Any] | None = None
        """The last line that is a JSON object."""

    def take(self, position: int, text: str) -> None:
        """Hear the text that stands at a position (in characters) of the log."""
        fresh = text[max(0, self._heard - position) :]
        self._heard = max(self._heard, position + len(text))
        *lines, self._rest = (self._rest + fresh).split("\n")
        for line in lines:
            self._line(line)

    def finish(self) -> None:
        """The log has ended: a last line may lack its newline."""
        rest, self._rest = self._rest, ""
        if rest:
            self._line(rest)

    def _line(self, line: str) -> None:
        if self._held is not None:
            if not line.strip():
                return
            self._say(self._held)
            self._held = None
        found = _json_object(line)
        if found is None:
            self._say(line)
        else:
            self._held, self.last_object = line, found


def _json_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
