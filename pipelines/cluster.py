"""The Ray cluster that a verb runs on: started for it on this host, or joined.

A local one's own ports listen on loopback only. (Torch's rendezvous of two or more training workers, which knows no
other way, listens on every interface while they train.) It keeps its files in a short temporary folder of its own (a
socket's path may not exceed 107 characters, however deep the checkout lies) and takes a random token from the
environment, so that no token file is written and no other user of the host can submit work to it. Leaving the block
removes all of it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import Failed, UserError, one_line

_PREFIX = "ddpm-"
_ANSWER_SECONDS = 10.0
_END_SECONDS = 2.0
"""For Ray's processes to end by themselves."""
_STARTS = 3
_OBJECT_STORE_BYTES = 256 * 2**20

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The controller looks at its workers this often; it bounds start and end of every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray gives its workers way to everything else on the host; they are what the user asked for.
    "RAY_worker_niceness": "0",
}

_LEAN = {
    # What nobody looks at where the cluster lives as long as one verb: on two cores, its upkeep is training's loss.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


class Cluster:
    """Ray, started or joined at the first use, so that a verb with nothing to do starts nothing."""

    def __init__(self, address: str | None, for_tune: bool = False) -> None:
        """for_tune: whether Ray Tune will use it, which asks the dashboard's State API which trials are alive; of no
        meaning to one that is joined.
        """
        self._address, self._for_tune = address, for_tune
        self._stack = contextlib.ExitStack()
        self._connected = False
        self._own = False

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connect(self) -> Any:
        """The `ray` module, connected."""
        if not self._connected:
            self._own = self._stack.enter_context(_session(self._address, self._for_tune))
            self._connected = True
        import ray

        return ray

    @property
    def is_own(self) -> bool:
        """Whether it was started here, and nobody else uses it."""
        return self._own

    def check_serves_tune(self) -> None:
        """ValueError where it was started here without what Ray Tune needs."""
        self.connect()
        if self._own and not self._for_tune:
            raise ValueError("a cluster that Ray Tune uses is Cluster(None, for_tune=True)")

    def check_cpus(self, field: str, need: int) -> None:
        """UserError, naming the field, where no task of so many CPUs can ever run: it takes them on one host.

        A cluster without any CPU has yet to grow, and nothing is known of its hosts.
        """
        nodes = [node for node in self.connect().nodes() if node["Alive"]]
        have = int(max(node["Resources"].get("CPU", 0) for node in nodes))
        if need > have > 0:
            raise UserError(f"{field}: {need} threads need {need} CPUs of one host, the largest has {have}: lower it")

    def cpus(self) -> int:
        """CPUs of the whole cluster."""
        return int(self.resource("CPU"))

    def hosts(self) -> int:
        """Hosts of the cluster."""
        return sum(bool(node["Alive"]) for node in self.connect().nodes())

    def draining(self) -> set[str]:
        """Hosts of the cluster that are about to leave it, by their ids: preempted, say, or being replaced."""
        self.connect()
        from ray._private.state import state  # Ray Train's own preemption watcher reads it there

        return set(state.get_draining_nodes() or {})

    def resource(self, name: str) -> float:
        """What the whole cluster has of one of Ray's resources."""
        return float(self.connect().cluster_resources().get(name, 0))


@contextlib.contextmanager
def _session(address: str | None, for_tune: bool) -> Iterator[bool]:
    """Whether the cluster is our own."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    _start_no_other()
    on_terminate = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        try:
            own = stack.enter_context(_local(for_tune) if address is None else _joined(address))
        except SystemExit as end:
            if end.code == signal.SIGTERM:  # met while Ray's handler was in the place of ours
                raise KeyboardInterrupt from None
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                # Ray takes SIGTERM for itself and dies of it on the spot; we have things to put away.
                signal.signal(signal.SIGTERM, on_terminate)
        yield own


@contextlib.contextmanager
def _joined(address: str) -> Iterator[bool]:
    _check_answers(address)
    import ray

    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UserError(f"ray.address: cannot join {address}: {one_line(error)}") from None
    try:
        yield False
    finally:
        _shut_down(ray)


def _check_answers(address: str) -> None:
    """UserError at once where nobody listens: Ray itself tries again for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:  # "auto", or what Ray itself has a word on
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray.address: nobody answers at {address} ({one_line(error)})") from None


@contextlib.contextmanager
def _local(for_tune: bool) -> Iterator[bool]:
    # With no mode said, Ray turns tokens on as it starts, also in a process that has imported it long before; a mode
    # set here would come too late for that one.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_urlsafe(32))
    # A variable of the surroundings must not turn "start a cluster here" into "join that one".
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    if ray.is_initialized():  # by whoever called us as a library: theirs to end
        yield False
        return
    if " " in sys.executable:
        raise UserError(f"Ray cannot start workers by {sys.executable}: move the environment to a path without spaces")
    _remove_folders_of_the_dead()
    _stay_on_loopback()
    before = {name: os.environ.get(name) for name in ("TMPDIR", *_LEAN)}
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_short_temporary_root())
    try:
        # What Ray's own processes leave in the temporary folder is to go with ours.
        os.environ["TMPDIR"] = folder
        for name, value in _LEAN.items():
            os.environ.setdefault(name, value)
        _start(ray, folder, for_tune)
        _put_back(before)
        _end_log_monitor()
        yield True
    finally:
        _put_back(before)
        family = _started_for(folder)
        _shut_down(ray)
        _end(family)
        shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, folder: str, for_tune: bool) -> None:
    """Start Ray there; again where it took too long, for Ray itself waits for 30 s only, however busy the host is."""
    for left in reversed(range(_STARTS)):
        # Ray's helpers look for their cluster by the host's processes, and give up where there are two of them (a
        # trial's placement group then stays for ever): tell every worker which one it belongs to.
        port = _free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        try:
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=for_tune,  # without it, placement groups of Tune's leak
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                # Below ours, which is closed to other users: Ray opens its own to all.
                _temp_dir=f"{folder}/r",
                _node_ip_address="127.0.0.1",
                runtime_env={"env_vars": {"RAY_ADDRESS": f"127.0.0.1:{port}", "TMPDIR": folder}},
                **_QUIET,
            )
            return
        except Exception as error:
            if type(error) is not Exception:  # which is all the type that a start that took too long has
                raise
            _end(_started_for(folder))
            if not left:
                raise Failed(f"Ray did not start on this host in {_STARTS} attempts: {one_line(error)}") from None


def _shut_down(ray: Any) -> None:
    """Ray's end gives SIGTERM back to the system, which kills on the spot; Python does not know of it."""
    ray.shutdown()
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _end_log_monitor() -> None:
    """It reads the workers' logs ten times a second, for a driver that does not want them."""
    from ray._private.worker import _global_node

    _global_node.kill_log_monitor(check_alive=False)


def _start_no_other() -> None:
    """Whoever finds no Ray, for an interrupt ends ours in just that moment, must not start one of its own."""
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


def _put_back(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _started_for(folder: str) -> list[Any]:
    """The processes of the Ray that keeps its files there: those that this one started, and all that these did."""
    import psutil

    found: list[Any] = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return found


def _end(family: list[Any]) -> None:
    """Kill what lives on: a worker of Ray's now and then waits for itself in its own last moment, for ever."""
    import psutil

    _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _stay_on_loopback() -> None:
    """Ray turns 127.0.0.1 into the host's address where it expects a cluster of several hosts: say there is none."""
    from ray._private import ray_constants

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which may have imported Ray before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _short_temporary_root() -> str:
    """The system's temporary folder, where its path is short enough for Ray's sockets; else /tmp."""
    root = tempfile.gettempdir()
    return root if len(root) <= 24 else "/tmp"


def _remove_folders_of_the_dead() -> None:
    """Remove the folders that killed processes of ours left behind; their names say whose they were."""
    for folder in Path(_short_temporary_root()).glob(f"{_PREFIX}[0-9]*-*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
