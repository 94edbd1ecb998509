"""A whole cluster on this machine: prepared, started, waited for, ended."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Self

from services.core.errors import UnavailableError
from services.launcher.binaries import find_binary
from services.launcher.checkpoint_info import CheckpointInfo, inspect_checkpoint
from services.launcher.console import Console
from services.launcher.options import ClusterOptions
from services.launcher.plan import ProcessSpec, Surroundings, check_overlay, check_pool, make_plan
from services.launcher.ports import HOST, claim_port, free_ports
from services.launcher.run_directory import RunDirectory
from services.launcher.supervisor import Supervisor

_BASE_KINDS = ("etcd", "redis")
_BASE_TIMEOUT_S = 30.0
_POLL_S = 0.1
_ANSWER_TIMEOUT_S = 2.0


class LocalCluster:
    """The processes of one ``infinite-llm up``. ``prepare`` finds everything that is wrong before anything starts."""

    def __init__(
        self, options: ClusterOptions, checkpoint: CheckpointInfo, around: Surroundings, run: RunDirectory
    ) -> None:
        self.checkpoint = checkpoint
        self.http_address = f"{HOST}:{around.http_port}"
        self.grpc_address = f"{HOST}:{around.grpc_port}"
        self.run = run
        self._around = around
        self._start_timeout_s = options.start_timeout_s
        self._plan = make_plan(options, checkpoint, around)

    @classmethod
    def prepare(cls, options: ClusterOptions) -> Self:
        """Checks the model, the options and the ports, and makes the run directory.

        Raises:
            ConfigError: something is wrong; the message says what to change.
        """
        checkpoint = inspect_checkpoint(options.model)
        check_overlay(options.overlay)
        check_pool(options, checkpoint)
        etcd_binary, redis_binary = find_binary("etcd"), find_binary("redis-server")
        http_port = claim_port("--http-port", options.http_port)
        grpc_port = claim_port("--grpc-port", options.grpc_port)
        etcd_port, etcd_peer_port, redis_port = free_ports(3)
        run = RunDirectory.create(options.run_dir)
        around = Surroundings(
            python=sys.executable,
            etcd_binary=etcd_binary,
            redis_binary=redis_binary,
            etcd_port=etcd_port,
            etcd_peer_port=etcd_peer_port,
            redis_port=redis_port,
            http_port=http_port,
            grpc_port=grpc_port,
            configs=run.configs,
            data=run.data,
            sockets=run.sockets,
            cpus=len(os.sched_getaffinity(0)),
        )
        return cls(options, checkpoint, around, run)

    async def start(self, supervisor: Supervisor, console: Console) -> int:
        """Starts everything and waits until the gateway says that the cluster is ready; answers 0.

        Raises:
            UnavailableError: a process ended meanwhile, or the time was not enough.
        """
        base = [spec for spec in self._plan if spec.kind in _BASE_KINDS]
        services = [spec for spec in self._plan if spec.kind not in _BASE_KINDS]
        started_at = time.monotonic()
        supervisor.start(base)
        ports = (self._around.etcd_port, self._around.redis_port)
        await self._wait(supervisor, started_at + _BASE_TIMEOUT_S, lambda: _all_accept(ports), lambda _: None)
        supervisor.start(services)
        names = _summary(services)

        def show(answer: str) -> None:
            console.status(f"starting {names} ... {time.monotonic() - started_at:.0f} s  {answer}"[:150].rstrip())

        deadline = started_at + self._start_timeout_s
        await self._wait(supervisor, deadline, lambda: _health(self._around.http_port), show)
        console.line(f"{names}: ready after {time.monotonic() - started_at:.1f} s")
        return 0

    async def _wait(
        self,
        supervisor: Supervisor,
        deadline: float,
        ready: Callable[[], Coroutine[None, None, tuple[bool, str]]],
        show: Callable[[str], None],
    ) -> None:
        while True:
            is_ready, answer = await ready()
            if is_ready:
                return
            supervisor.require_running()
            show(answer)
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"the cluster was not ready in time ({answer or 'no answer'}); "
                    f"see the logs in {self.run.logs}, or give a longer --start-timeout"
                )
            await asyncio.sleep(_POLL_S)


def _summary(specs: list[ProcessSpec]) -> str:
    counts: dict[str, int] = {}
    for spec in specs:
        counts[spec.kind] = counts.get(spec.kind, 0) + 1
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items())


async def _all_accept(ports: tuple[int, ...]) -> tuple[bool, str]:
    """Whether somebody accepts connections on all of the ports."""
    for port in ports:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                _, writer = await asyncio.open_connection(HOST, port)
        except (OSError, TimeoutError):
            return False, f"port {port} does not answer yet"
        writer.close()
    return True, ""


async def _health(port: int) -> tuple[bool, str]:
    """Whether GET /health answers 200, and the body of the answer."""
    writer = None
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(f"GET /health HTTP/1.0\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
            answer = (await reader.read(64 * 1024)).decode(errors="replace")
    except (OSError, TimeoutError):
        return False, ""
    finally:
        if writer is not None:
            writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head.split(" ", 2)[1:2] == ["200"], _missing(body)


def _missing(health: str) -> str:
    """What /health says is not there yet."""
    try:
        return ", ".join(json.loads(health)["missing"])
    except (ValueError, KeyError, TypeError):
        return ""
