"""MLflow's own UI on a store: the command that opens it, and serving it on loopback."""

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import NoReturn

from pipelines.errors import UserError
from pipelines.session import Session
from pipelines.tracking import Address

_HOST = "127.0.0.1"


def ui_command(session: Session) -> str:
    """The command that shows this session's runs, wherever it is typed."""
    beside = Path(sys.argv[0])
    command = [str(beside.absolute()) if beside.name == "ddpm" else "ddpm", "ui", "--storage", str(session.store)]
    local = session.tracking_uri == f"sqlite:///{session.store / 'mlflow.db'}"
    return shlex.join([*command, *([] if local else ["--tracking-uri", session.tracking_uri])])


def serve_ui(address: Address, port: int) -> NoReturn:
    """Become MLflow's server on a local address, until interrupted; say where a remote one is.

    UserError where the port is taken.
    """
    if address.artifacts is None:
        print(f"MLflow is a server already: open {address.shown}")
        sys.exit(0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.connect_ex((_HOST, port)) == 0:
            raise UserError(f"--port {port}: something listens there already, name another port")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address.uri]
    command += ["--registry-store-uri", address.uri, "--default-artifact-root", address.artifacts]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    print(f"http://{_HOST}:{port}  in a few seconds; Ctrl-C ends it", file=sys.stderr, flush=True)
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    os.execve(command[0], command, {**os.environ, **quiet})
