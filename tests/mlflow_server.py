"""A real MLflow server in a process of its own, and before it a proxy that answers late or not at all."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """MLflow on loopback, with its database in a folder: what it has said that it has outlives a SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        surroundings = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=surroundings, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < end, (self._folder / "server.log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and the process that answers for it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Proxy:
    """Passes bytes on to the server at `upstream`, `delay` seconds late, and in the order they came.

    `refuse`: hang up at once. `lost`: of requests with this in their first line, which answers are thrown away in turn,
    after the server did what it was asked; the connection ends then.
    """

    def __init__(self, upstream: int) -> None:
        self.delay, self.refuse = 0.0, False
        self.lost: dict[str, list[bool]] = {}
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            if self.refuse:
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                asked = ""
                while not self._closing.is_set():
                    for ready in select.select([client, server], [], [], 0.2)[0]:
                        data = ready.recv(1 << 20)
                        if not data or self.refuse:
                            return
                        if ready is client:
                            line = data.split(b"\r\n", 1)[0]
                            if line.endswith(b"HTTP/1.1"):  # a body comes by itself
                                asked = line.decode()
                                self._closing.wait(self.delay)
                            server.sendall(data)
                        elif self._loses(asked):
                            return
                        else:
                            asked = ""  # an answer may come in parts
                            client.sendall(data)

    def _loses(self, asked: str) -> bool:
        return next((turns.pop(0) for part, turns in self.lost.items() if part in asked and turns), False)


@contextlib.contextmanager
def proxy_to(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    try:
        yield proxy
    finally:
        proxy.close()


def history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, in the order of steps: one twice would be here twice."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
