"""Runs the application until a signal, then lets what is running finish."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dspark.common.errors import UserError
from dspark.server.connections import PatientProtocol
from dspark.server.limits import Gate

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which refuses connections until the server listens. Port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {why}; pass another --host or --port") from error
    return bound


def address(bound: socket.socket) -> str:
    """The socket's address as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, whose first signal also shuts the gate."""

    def __init__(self, config: uvicorn.Config, gate: Gate):
        super().__init__(config)
        self.gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """No new requests; those inside go on until the grace period ends."""
        self.gate.closed = True
        super().handle_exit(sig, frame)


def make_server(app: FastAPI, *, grace: int = 30, protocol: type[PatientProtocol] = PatientProtocol) -> Server:
    """A server of `app`; `grace` in seconds is what running requests get once it is told to stop.

    It logs where logs.py sends everything; uvicorn's own line for each request would repeat ours.
    """
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace,
        backlog=BACKLOG,
        ws="none",
        server_header=False,
    )
    return Server(config, app.state.service.gate)


def allow_connections() -> None:
    """As many open files as the system lets this process have: each connection is one, and 1024 are soon used."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(server: Server, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then return when the running requests have ended or the grace period has.

    uvicorn raises the signal again when it is done, for whoever had a handler before: here nobody, so that an orderly
    end is a return. A signal that comes before uvicorn listens for it ends the server as well.
    """

    def early(sig: int, frame: FrameType | None) -> None:
        server.should_exit = True

    allow_connections()
    before = {sig: signal.signal(sig, early) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
