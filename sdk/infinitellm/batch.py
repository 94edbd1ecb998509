"""Many prompts at once: ``complete_batch`` of both clients."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TextIO

from infinitellm.errors import InfiniteLLMError
from infinitellm.types import Completion, Prompt

Outcome = Completion | InfiniteLLMError

_BAR_WIDTH = 30


class ProgressBar:
    """``[#####.....] 12/24 3.1/s``, written over itself.

    Args:
        shown: None: where ``stream`` is a terminal.
    """

    def __init__(self, total: int, shown: bool | None, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty() if shown is None else shown
        self._done = 0
        self._began_at = time.monotonic()
        self._draw()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._draw()

    def _draw(self) -> None:
        if not self._shown:
            return
        filled = _BAR_WIDTH * self._done // max(1, self._total)
        per_s = self._done / max(1e-9, time.monotonic() - self._began_at)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        end = "\n" if self._done == self._total else ""
        self._stream.write(f"\r[{bar}] {self._done}/{self._total} {per_s:.1f}/s{end}")
        self._stream.flush()


def run_batch(
    complete: Callable[[Prompt], Completion], prompts: Sequence[Prompt], concurrency: int, progress: bool | None
) -> list[Outcome]:
    """Completes all prompts in threads; an error takes its prompt's place."""

    def outcome(prompt: Prompt) -> Outcome:
        try:
            return complete(prompt)
        except InfiniteLLMError as error:
            return error

    bar = ProgressBar(len(prompts), progress)
    pool = ThreadPoolExecutor(max(1, concurrency), thread_name_prefix="infinitellm-batch")
    try:
        futures = [pool.submit(outcome, prompt) for prompt in prompts]
        for _ in as_completed(futures):
            bar.advance()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


async def run_batch_async(
    complete: Callable[[Prompt], Awaitable[Completion]],
    prompts: Sequence[Prompt],
    concurrency: int,
    progress: bool | None,
) -> list[Outcome]:
    """Likewise, in tasks."""
    room = asyncio.Semaphore(max(1, concurrency))
    bar = ProgressBar(len(prompts), progress)

    async def outcome(prompt: Prompt) -> Outcome:
        async with room:
            try:
                return await complete(prompt)
            except InfiniteLLMError as error:
                return error
            finally:
                bar.advance()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(outcome(prompt)) for prompt in prompts]
    return [task.result() for task in tasks]
