"""uvicorn on the service's own event loop: the service decides when it ends; uvicorn touches no signal, no logger."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn
from starlette.applications import Starlette

from services.core.errors import ConfigError
from services.runtime.addresses import is_loopback, split_address

BACKLOG = 2048
KEEP_ALIVE_S = 30


class HttpServer:
    """Serves one ASGI application on one address.

    Args:
        listen: host:port; port 0 takes a free one.
        grace_s: how long ``close`` lets requests go on.
        key: of ``listen`` in the configuration, for messages.
    Raises: ConfigError when the address is taken, or not loopback without ``allow_insecure``.
    """

    def __init__(
        self, app: Starlette, listen: str, grace_s: float, allow_insecure: bool, key: str = "http_listen"
    ) -> None:
        host, port = split_address(listen)
        if not allow_insecure and not is_loopback(host):
            raise ConfigError(
                f"{key}: refusing to listen on {listen} without TLS; listen on 127.0.0.1, or set allow_insecure "
                "if the network is private"
            )
        try:
            self._socket = socket.create_server(
                (host.strip("[]"), port), family=_family(host), backlog=BACKLOG, reuse_port=False
            )
        except OSError as exc:
            raise ConfigError(f"{key}: cannot listen on {listen}: {exc.strerror or exc}") from exc
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Starts serving; the task ends only with an error or after ``close``."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        return self._task

    async def close(self) -> None:
        """Takes no more connections, waits for requests for the grace period, then cancels them."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task])
        self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if host.startswith("[") else socket.AF_INET
