"""A Ray cluster of several hosts, all of them this one, each with an address of its own on loopback.

A host is what `ray start --block` starts, in a temporary folder and a process group of its own. The head asks for a
token, which only this process and its children know.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.verb import assert_gone
from tests.jobs.submit.conftest import free_port
from tests.jobs.submit.test_submit_real import end

_HEAD = "127.0.0.2"
_UP_SECONDS = 90.0
_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A host that is gone is missed within seconds, one that is slow is not.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_NODES = """
import json, sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(json.dumps({node.node_id.hex(): node.node_manager_address for node in nodes if node.state == 0}))
"""


@dataclass
class Host:
    """One host of the cluster."""

    ip: str
    process: subprocess.Popen[bytes]
    folder: Path

    def family(self) -> set[psutil.Process]:
        return {psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)}

    def raylet(self) -> psutil.Process:
        """What holds the host's other processes of Ray together, and them to the cluster."""
        (found,) = (process for process in self.family() if process.name() == "raylet")
        return found

    def end(self) -> None:
        end(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)


class Hosts:
    """A head and those that joined it, of one CPU each."""

    def __init__(self) -> None:
        self.address = f"{_HEAD}:{free_port()}"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_urlsafe(32)}
        self._number = 3
        self.alive: list[Host] = []
        port = self.address.rpartition(":")[2]
        self.head = self._start(_HEAD, "--head", f"--port={port}", "--dashboard-host=127.0.0.1", "--dashboard-port=0")

    def join(self) -> Host:
        """A new host joins."""
        ip = f"127.0.0.{self._number}"
        self._number += 1
        return self._start(ip, f"--address={self.address}")

    def lose(self, host: Host) -> None:
        """A host's raylet dies, and with it what it had started."""
        family = host.family()
        host.raylet().kill()
        assert_gone(family)
        self.alive.remove(host)
        host.end()

    def drain(self, host: Host, seconds: int) -> None:
        """Tell the cluster, as one who preempts hosts does, that this one goes in so many seconds."""
        (node,) = (node for node, ip in self._nodes().items() if ip == host.ip)
        reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test")
        command = (*_RAY, "drain-node", f"--address={self.address}", f"--node-id={node}", *reason)
        subprocess.run((*command, f"--deadline-remaining-seconds={seconds}"), env=self._environment(), check=True)

    def _start(self, ip: str, *options: str) -> Host:
        folder = Path(tempfile.mkdtemp(prefix="ddpm-host-", dir="/tmp"))  # a socket's path must stay short
        ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")
        command = [*_RAY, "start", "--block", "--num-cpus=1", f"--node-ip-address={ip}", f"--temp-dir={folder}"]
        command += ["--object-store-memory=100000000", *(f"--{name}-port={free_port()}" for name in ports), *options]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                command, env=self._environment(), stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        host = Host(ip, process, folder)
        self.alive.append(host)
        deadline = time.monotonic() + _UP_SECONDS
        while ip not in self._nodes().values():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        return host

    def _nodes(self) -> dict[str, str]:
        """Addresses of the living, by id."""
        found = subprocess.run(
            (sys.executable, "-c", _NODES, self.address),
            env=self._environment(),
            capture_output=True,
            timeout=_UP_SECONDS,
            check=False,
        )
        return json.loads(found.stdout) if not found.returncode else {}

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DDPM_", "MLFLOW_"))}
        return {**ours, **_SETTINGS, **self.token}


@contextmanager
def hosts() -> Iterator[Hosts]:
    """A head alone, to begin with."""
    cluster = Hosts()
    try:
        yield cluster
    finally:
        for host in reversed(cluster.alive):
            host.end()
