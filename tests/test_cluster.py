"""The local cluster: on loopback only, closed to other users, and honest about what fits."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipelines.cluster import Cluster
from pipelines.errors import UserError


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    ray = cluster.connect()
    ray.get(ray.remote(lambda: os.getpid()).remote())
    ours = {psutil.Process(), *filter(is_of_ray, psutil.Process().children(recursive=True))}
    listening = set().union(*map(listens_at, ours))
    assert listening
    assert listening <= {"127.0.0.1", "::1"}


def is_of_ray(process: psutil.Process) -> bool:
    try:
        return any("ray" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # it has ended meanwhile, and a zombie listens to nothing
        return False


def listens_at(process: psutil.Process) -> set[str]:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.ip.removeprefix("::ffff:") for c in found if c.status == psutil.CONN_LISTEN}


def test_its_folder_is_closed_to_others_and_no_token_file_is_written(cluster: Cluster) -> None:
    cluster.connect()
    (folder,) = Path("/tmp").glob(f"ddpm-{os.getpid()}-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or stat.S_IMODE(token.stat().st_mode) == 0o600


def test_what_can_never_run_is_refused_by_its_field(cluster: Cluster) -> None:
    with pytest.raises(UserError, match=r"^sample\.threads: .* the largest has"):
        cluster.check_cpus("sample.threads", cluster.cpus() + 1)


def test_a_task_takes_its_cpus_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 1), (True, 1), (False, 8))]
    cluster = Cluster(None)
    monkeypatch.setattr(cluster, "connect", lambda: SimpleNamespace(nodes=lambda: nodes))
    cluster.check_cpus("sample.threads", 1)
    with pytest.raises(UserError, match="the largest has 1"):
        cluster.check_cpus("sample.threads", 2)


def test_a_cluster_that_has_yet_to_grow_is_asked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head has no CPUs, and its autoscaler brings hosts when it sees what waits."""
    cluster = Cluster("127.0.0.1:1")
    node = {"Alive": True, "Resources": {"memory": 1.0}}
    monkeypatch.setattr(Cluster, "connect", lambda self: SimpleNamespace(nodes=lambda: [node]))
    cluster.check_cpus("sample.threads", 8)


def test_a_process_that_had_imported_ray_gets_tokens_and_loopback_too() -> None:
    """Ray reads both settings when it is imported, which is before we are asked, where we are a library."""
    code = """
        import os, ray, signal
        from pipelines.cluster import Cluster
        with Cluster(None) as cluster:
            cluster.connect()
            from ray._raylet import AuthenticationMode, get_authentication_mode
            print(get_authentication_mode() == AuthenticationMode.TOKEN, ray.get_runtime_context().gcs_address)
        signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM is ours"))
        with Cluster(None) as cluster:
            cluster.connect()
        signal.raise_signal(signal.SIGTERM)
        try:
            ray.nodes()
        except ray.exceptions.RaySystemError:
            print("none is started in its place")
    """
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**surroundings, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    (token_on, address), ended = done.stdout.splitlines()[0].split(), done.stdout.splitlines()[1:]
    assert ended == ["SIGTERM is ours", "none is started in its place"], done.stderr
    assert token_on == "True", done.stderr
    assert address.startswith("127.0.0.1:")


@pytest.mark.faults
def test_a_ray_that_does_not_come_up_in_time_is_started_again() -> None:
    code = """
        import sys, time
        from ray._private import services
        from pipelines.cluster import Cluster
        find, began = services.get_node, time.monotonic()

        def late(*arguments):
            if time.monotonic() - began < float(sys.argv[1]):
                time.sleep(0.5)
                raise RuntimeError("not there yet")
            return find(*arguments)

        services.get_node = late
        with Cluster(None) as cluster:
            ray = cluster.connect()
            print(len(ray.nodes()), ray.get(ray.remote(lambda: "works").remote()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "31"]
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["1", "works"], done.stderr
