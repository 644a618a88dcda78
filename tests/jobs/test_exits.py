"""How a verb's process ends."""

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_meets_python_in_a_callback_is_not_lost(number: str) -> None:
    """An exception raised there is printed and ignored by the interpreter."""
    code = f"""
        import signal, time, weakref
        from jobs.exits import end_process

        class Thing: ...

        def verb():
            thing = Thing()
            seen = weakref.ref(thing, lambda _: signal.raise_signal(signal.{number}))
            del thing
            print("goes on", flush=True)
            for _ in range(200):
                time.sleep(0.1)

        end_process(verb)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "ddpm: interrupted\n"
