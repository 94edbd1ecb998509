"""Several answers to one prompt, side by side.

The first one computes the prompt; the others begin when it has, at the same instance, and find the prompt's full blocks
in its cache. Each is a request of its own that follows from the first one: whoever takes that over knows the others.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from services.gateway.generation import Generation
from services.gateway.requests import Event, Finished, GenerationRequest, Progress, PromptLogprobs

ChoiceEvent = tuple[int, Event]  # the choice's index, and what is told of it


def choice_of(first: GenerationRequest, index: int) -> GenerationRequest:
    """Another choice, of ``index`` 1 and on, with draws of its own; the first one draws as if it were the only one."""
    key = first.seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return replace(first, request_id=f"{first.request_id}-{index}", seed=seed, choices=1, traceparent="", takeovers=0)


async def events_of(generations: Sequence[Generation]) -> AsyncGenerator[ChoiceEvent, None]:
    """What happens to any of them, in its order for each; ends when the last one has finished.

    Close it (``aclosing``) to end all of them early. Raises as ``Generation.events``; the others end with the first
    that fails.
    """
    if len(generations) == 1:
        async with aclosing(generations[0].events()) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
    tasks = [asyncio.create_task(_follow(generations[0].events(), 0, queue))]
    unfinished = len(generations)
    try:
        while unfinished:
            index, happened = await queue.get()
            if isinstance(happened, Exception):
                raise happened
            if len(tasks) == 1 and not isinstance(happened, Progress | PromptLogprobs):
                tasks += [
                    asyncio.create_task(_follow(generation.events(generations[0]), other, queue))
                    for other, generation in enumerate(generations[1:], 1)
                ]
            unfinished -= isinstance(happened, Finished)
            yield index, happened
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    happening: AsyncGenerator[Event, None], index: int, queue: asyncio.Queue[tuple[int, Event | Exception]]
) -> None:
    try:
        async with aclosing(happening) as events:
            async for event in events:
                queue.put_nowait((index, event))
    except Exception as exc:  # whatever it is, it is raised where the events are taken
        queue.put_nowait((index, exc))
