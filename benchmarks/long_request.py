"""One long request, timed token by token at the client, its answer checked, its placement looked up while it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from infinitellm import AsyncClient, Progress, Tokens
from services.core.errors import InfiniteLLMError
from services.launcher.needle.task import NeedleTask, oracle
from services.launcher.needle.vocabulary import Vocabulary

COUNTED_TOKENS = 64  # generated after the answer; the time per output token is taken over them
_TAIL_TOKENS = 1024  # the request goes on for up to so many while its placement is looked up; then it is cancelled
ANSWER_TOKENS = 9  # eight digits and EOS
MAX_TOKENS = ANSWER_TOKENS + COUNTED_TOKENS + _TAIL_TOKENS
_REQUEST_TIMEOUT_S = 3600.0
_STATUS_TIMEOUT_S = 20.0
_POLL_S = 0.05
_SHOW_S = 2.0  # between two words about the prefill


class VoidMeasurementError(InfiniteLLMError):
    """What was measured does not answer the question: a wrong answer, a cached prompt, blocks that stay held."""


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """What is asked, and the right answer.

    Attributes:
        expected: the first ``ANSWER_TOKENS + COUNTED_TOKENS`` tokens that must come.
        blocks: rBlocks that the prompt fills.
    """

    token_ids: tuple[int, ...]
    expected: tuple[int, ...]
    blocks: int


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a running request's KV cache lies, in bytes, by the cluster's own status."""

    local_bytes: int
    remote_bytes: int

    @property
    def remote_share(self) -> float:
        return self.remote_bytes / (self.local_bytes + self.remote_bytes)


@dataclass(frozen=True, slots=True)
class Timed:
    """One request.

    Attributes:
        ttft_s: from the call to the first token.
        tpot_ms: mean time between tokens over ``COUNTED_TOKENS``.
    """

    ttft_s: float
    tpot_ms: float
    placed: Placed


def expected_tokens(vocabulary: Vocabulary, task: NeedleTask, count: int) -> tuple[int, ...]:
    """The answer and what the checkpoint goes on with when EOS does not end it: ``count`` tokens in all."""
    tokens = list(task.expected_token_ids)
    while len(tokens) < count:
        tokens += oracle(vocabulary, [*task.prompt_token_ids, *tokens], count - len(tokens))
    return tuple(tokens[:count])


async def time_request(
    client: AsyncClient, prompt: LongPrompt, chunk_tokens: int, show: Callable[[str], None]
) -> Timed:
    """Sends the prompt and takes the times. Returns when the cluster holds nothing for the request any more.

    The status is asked for only after the last token that counts, so that looking does not slow down what is seen.

    Args:
        chunk_tokens: of a prefill chunk: a first step that goes further has found a cached prefix.
        show: is told now and then how far the prefill is.

    Raises:
        VoidMeasurementError: see there.
        infinitellm.InfiniteLLMError: the cluster refused the request or failed.
    """
    got: list[int] = []
    arrived: list[float] = []  # when each of them came
    first_progress, request_id = 0, ""
    started = shown = time.perf_counter()
    events = client.generate(
        prompt.token_ids, max_tokens=MAX_TOKENS, ignore_eos=True, progress=True, timeout_s=_REQUEST_TIMEOUT_S
    )
    async with aclosing(events):
        async for event in events:
            now = time.perf_counter()
            request_id = event.request_id
            if isinstance(event, Progress):
                first_progress = first_progress or event.computed_tokens
                if now - shown >= _SHOW_S:
                    shown = now
                    show(f"prefill {event.computed_tokens:,}/{event.prompt_tokens:,}, {now - started:.0f} s")
            elif isinstance(event, Tokens):
                got += event.ids
                arrived += [now] * len(event.ids)
                if len(got) >= len(prompt.expected):
                    break
        wanted = list(prompt.expected)
        if got[: len(wanted)] != wanted:
            raise VoidMeasurementError(f"wrong answer: the oracle says {wanted}, the cluster said {got}")
        if first_progress > chunk_tokens:
            raise VoidMeasurementError(f"{first_progress - chunk_tokens} tokens of the prompt or more were cached")
        placed = await _placement(client, request_id, prompt.blocks)
    await _wait_until_free(client)
    counted_s = arrived[len(wanted) - 1] - arrived[len(wanted) - 1 - COUNTED_TOKENS]
    return Timed(arrived[0] - started, 1000 * counted_s / COUNTED_TOKENS, placed)


async def _placement(client: AsyncClient, request_id: str, prompt_blocks: int) -> Placed:
    """What the cluster says once it has heard of all of the prompt's blocks."""
    deadline = time.monotonic() + _STATUS_TIMEOUT_S
    while time.monotonic() < deadline:
        status = await client.cluster_status()
        block_bytes = max((daemon.block_bytes for daemon in status.kvdaemons), default=0)
        for request in status.requests:
            local = sum(part.num_blocks for part in request.placement if part.local)
            remote = sum(part.num_blocks for part in request.placement if not part.local)
            if request.request_id == request_id and local + remote > prompt_blocks:  # and one of generated tokens
                return Placed(local * block_bytes, remote * block_bytes)
        await asyncio.sleep(_POLL_S)
    raise VoidMeasurementError(f"the cluster's status did not show where request {request_id} lies")


async def _wait_until_free(client: AsyncClient) -> None:
    """The next request begins in a cluster that does nothing else."""
    deadline = time.monotonic() + _STATUS_TIMEOUT_S
    while True:
        status = await client.cluster_status()
        held = {daemon.kvdaemon_id: daemon.use for daemon in status.kvdaemons}
        held = {name: use for name, use in held.items() if use.in_use or use.reserved}
        if not held and not status.requests:
            return
        if time.monotonic() > deadline:
            raise VoidMeasurementError(f"blocks are still held after the request's end: {held}")
        await asyncio.sleep(_POLL_S)
