"""``infinite-llm generate``: one prompt to a running cluster, its answer as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing

from infinitellm import Client, Finished, Progress, SamplingOptions, Tokens
from services.core.errors import ConfigError
from services.launcher.console import Console


def read_prompt(text: str, token_ids: bool) -> str | list[int]:
    """A prompt from the command line; ``-`` reads standard input.

    Raises:
        ConfigError: ``token_ids`` were promised, and it is something else.
    """
    if text == "-":
        text = sys.stdin.read()
    if not token_ids:
        return text
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--token-ids: the prompt must be numbers: {error}") from error


def generate(
    address: str,
    api_key: str | None,
    prompt: str | Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int | None,
    options: SamplingOptions,
) -> int:
    """Streams an answer to standard output, and what it took to standard error; answers the exit code.

    Without a tokenizer an answer is token ids.

    Raises:
        infinitellm.InfiniteLLMError: the cluster refused the request, or failed.
    """
    answer, aside = Console(sys.stdout), Console(sys.stderr)
    started = time.perf_counter()
    first: float | None = None
    with Client(address, api_key=api_key) as client:
        events = client.generate(
            prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, progress=True, **options
        )
        with closing(events):
            for event in events:
                if isinstance(event, Progress):
                    aside.status(f"prefill {event.computed_tokens:,}/{event.prompt_tokens:,}")
                elif isinstance(event, Tokens):
                    aside.clear()
                    first = first or time.perf_counter()
                    answer.write(event.text or ("" if isinstance(prompt, str) else " ".join(map(str, event.ids)) + " "))
                elif isinstance(event, Finished):
                    answer.line()
                    aside.line(_summary(event, (first or started) - started, time.perf_counter() - (first or started)))
    return 0


def _summary(finished: Finished, ttft_s: float, rest_s: float) -> str:
    cached = f", {finished.cached_tokens:,} of them cached" if finished.cached_tokens else ""
    rate = f", {(finished.completion_tokens - 1) / rest_s:.1f} tokens/s" if finished.completion_tokens > 1 else ""
    return (
        f"[{finished.prompt_tokens:,} prompt tokens{cached}; first token after {ttft_s:.2f} s; "
        f"{finished.completion_tokens:,} tokens, {finished.reason}{rate}]"
    )
