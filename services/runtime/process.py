"""A service's process, quick to begin and sure to end.

A service is loaded by thousands of modules (torch's, transformers'), and what they make stays until the process ends.
Looking for garbage among it is a fifth of the time that loading takes; afterwards it would be a part of every full
collection, in which no token is computed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_log = logging.getLogger(__name__)
CLOSE_WITHIN_S = 12.0  # beside what is granted to requests; Kubernetes' own patience is 30 s


@contextmanager
def loading() -> Iterator[None]:
    """Around a service's imports: nothing is collected meanwhile, and nothing of what is there then is ever again.

    Torch reads from the environment how its threads wait. By default they look out for work on cores that the kernels'
    threads need: with two of each, a step of 8 requests took longer than with one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def collect_seldom() -> None:
    """For a process that holds very many small objects and makes hardly any garbage that only a collection finds."""
    gc.set_threshold(50_000, 20, 20)


def stop_event(within_s: float) -> asyncio.Event:
    """Is set by SIGTERM and SIGINT; for the event loop that runs.

    Args:
        within_s: what the process has from then on to close what it has opened. Afterwards it leaves with status 1 and
            logs what every task was waiting for: nobody can know of all that libraries wait for without a deadline.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def begin() -> None:
        stop.set()
        timer = threading.Timer(within_s, _leave_late, (loop, within_s))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin)
    return stop


def _leave_late(loop: asyncio.AbstractEventLoop, within_s: float) -> None:
    waiting = sorted(f"{task.get_name()}: {_place(task.get_coro())}" for task in asyncio.all_tasks(loop))
    _log.critical("not closed in time", extra={"seconds": within_s, "waiting": waiting})
    leave(1)


def _place(awaited: Any) -> str:
    """Where a coroutine is suspended, from the outside in."""
    places = []
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None:
            places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(places)


def leave(code: int) -> NoReturn:
    """Ends the process of a service that has closed what it had opened.

    At once: the interpreter would first take all of its modules apart, a second of work where torch is loaded.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
