"""Groups of processes that compute together under gloo, as Ray Train would start them but without Ray."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LOOK_SECONDS = 0.1


def run_group(work: str, workers: int, threads: int, **arguments: Any) -> Any:
    """What rank 0 returns of `MODULE:FUNCTION`, a function (world, **arguments) of and to plain values.

    RuntimeError where a rank fails; the others are then killed.
    """
    from pipelines.train.group import worker_environment

    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            **worker_environment(threads),
            "GLOO_SOCKET_IFNAME": "lo",
            "BENCHMARK_GROUP": folder,
            "WORLD_SIZE": str(workers),
        }
        command = [sys.executable, "-m", __spec__.name, work, json.dumps({**arguments, "threads": threads})]
        group = [subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}) for rank in range(workers)]
        try:
            _wait(group, work)
        finally:
            for process in group:
                process.kill()
                process.wait()
        return json.loads((Path(folder) / "result").read_text())


def _wait(group: Sequence["subprocess.Popen[bytes]"], work: str) -> None:
    while any(process.poll() is None for process in group):
        if any(process.poll() for process in group):
            break
        time.sleep(_LOOK_SECONDS)
    if any(process.poll() for process in group):
        raise RuntimeError(f"{work}: a process of its group failed, see above")


def _work(name: str, arguments: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from pipelines.train.world import World

    world, folder = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), os.environ["BENCHMARK_GROUP"]
    torch.set_num_threads(arguments.pop("threads"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=world.rank, world_size=world.size)
    module, function = name.split(":")
    result = getattr(importlib.import_module(module), function)(world, **arguments)
    if world.rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
