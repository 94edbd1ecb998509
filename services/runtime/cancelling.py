"""Ending tasks for good."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 1.0  # long enough for what a task does on its way out


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks until all have ended; what they raise is nobody's concern any more.

    Once is not enough for a task that awaits gRPC: a call that fails in the same moment raises its error in place of
    ``CancelledError``, and a loop that tries again then goes on for ever.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
