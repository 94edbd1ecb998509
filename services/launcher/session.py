"""From signal handlers to exit code: the life of a command that runs a cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine

from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.options import ClusterOptions
from services.launcher.supervisor import Supervisor

EXIT_INTERRUPTED = 130
# make, shells and supervisors may pass on a signal that the launcher has got already.
_SAME_SIGNAL_S = 1.0

Body = Callable[[LocalCluster, Console], Coroutine[None, None, int]]


async def run_cluster(options: ClusterOptions, console: Console, body: Body, *, serve: bool) -> int:
    """Starts a cluster, does ``body`` with it, goes on serving if ``serve``, and ends everything it has started.

    SIGINT or SIGTERM ends it in order; a second one at once (the children die with the launcher). Answers the exit
    code: the body's, or 130 if a signal came before the body was done.

    Raises:
        InfiniteLLMError: the cluster cannot start, or the body failed.
    """
    interrupted = asyncio.Event()
    first_at = 0.0

    def on_signal() -> None:
        nonlocal first_at
        if not interrupted.is_set():
            first_at = time.monotonic()
            interrupted.set()
        elif time.monotonic() - first_at > _SAME_SIGNAL_S:
            os._exit(EXIT_INTERRUPTED)

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, on_signal)

    cluster = LocalCluster.prepare(options)
    supervisor = Supervisor(cluster.run.configs, cluster.run.logs, console.line)
    failed = True
    try:
        code = await _serve(cluster, supervisor, console, body, interrupted, serve)
        failed = code not in (0, EXIT_INTERRUPTED)
        return code
    finally:
        if failed:
            console.line(f"the logs are in {cluster.run.logs}")
        console.line("ending the cluster ...")
        await supervisor.stop()
        cluster.run.close(keep=failed)


async def _serve(
    cluster: LocalCluster,
    supervisor: Supervisor,
    console: Console,
    body: Body,
    interrupted: asyncio.Event,
    serve: bool,
) -> int:
    if await _unless(interrupted, cluster.start(supervisor, console)) is None:
        return EXIT_INTERRUPTED
    watching = asyncio.create_task(supervisor.run())
    try:
        code = await _unless(interrupted, body(cluster, console))
        if code is None:
            return EXIT_INTERRUPTED
        if serve:
            console.line("Ctrl-C ends it.")
            await interrupted.wait()
        return code
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def _unless(interrupted: asyncio.Event, work: Coroutine[None, None, int]) -> int | None:
    """What ``work`` answers; None if it was interrupted, and cancelled, before it was done."""
    working = asyncio.create_task(work)
    interruption = asyncio.create_task(interrupted.wait())
    try:
        await asyncio.wait([working, interruption], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        interruption.cancel()
        await asyncio.wait([working, interruption])
