"""How a verb's process ends: a known failure is one line on stderr and an exit code, and nothing is left behind."""

import _thread
import atexit
import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any, NoReturn

from jobs.notices import warnings_to
from pipelines.errors import Failed, Refused, UserError, one_line
from pipelines.store import DamageError

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""What no line of ours is to blame for."""
_ONCE_MORE_SECONDS = 0.05


def end_process(verb: Callable[[], int | None]) -> NoReturn:
    """Run a verb and end the process: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _once_more
    warnings.filterwarnings("once", category=UserWarning)
    warnings_to(lambda line: _say(line, 0))
    code = 1
    try:
        code = _exit_code(verb)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    # Libraries' threads, still alive in a dying interpreter, now and then abort it after all is done: leave by
    # ourselves, our things and theirs put away.
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _once_more(lost: "sys.UnraisableHookArgs") -> None:
    """An interrupt that met Python in a callback of the interpreter's, out of which nothing can be raised: it comes
    again a moment later."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        timer = threading.Timer(_ONCE_MORE_SECONDS, _thread.interrupt_main)
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(lost)


def _exit_code(verb: Callable[[], int | None]) -> int:
    try:
        code = verb()
    except UserError as error:
        # One that comes out of a Ray task is wrapped in the task's traceback.
        return _say(str(getattr(error, "cause", None) or error), 2)
    except Refused as error:
        if "--json" in sys.argv:
            print(json.dumps(_plain(error), ensure_ascii=False, default=str), flush=True)
        return _say(f"refused: {error}", 3)
    except (Failed, DamageError) as error:
        return _say(f"failed: {getattr(error, 'cause', None) or error}", 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        return _say(f"failed: {error.filename or 'the storage'}: {error.strerror}; what is done is kept", 1)
    except Exception as error:
        # A word of the command line that typer does not take; it has its own classes for that, in no public place.
        if not hasattr(error, "format_message"):
            if type(error).__module__.split(".")[0] != "mlflow":
                raise
            return _say(f"failed: MLflow: {one_line(error)}; what is done is kept, run it again when MLflow answers", 1)
        return _say(error.format_message(), 2)
    if code == 130:  # typer's way to pass Ctrl-C on
        return _say("interrupted", 130)
    return int(code or 0)


def _plain(refusal: Refused) -> dict[str, Any]:
    found = {} if refusal.result is None else asdict(refusal.result)
    return {**found, "refused": str(refusal), "decision": refusal.decision}


def _say(message: str, code: int) -> int:
    print(f"ddpm: {message}", file=sys.stderr)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
