"""What a gateway measures of each request, and tells its span."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from services.core.errors import InfiniteLLMError
from services.gateway.request_span import UNTRACED, RequestSpan
from services.runtime import metrics

_REFUSED = "refused"
_OUTCOMES = ("stop", "length", "aborted", _REFUSED)


class RequestMetrics:
    """Of all requests. Used from the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token = metrics.TIME_TO_FIRST_TOKEN.histogram(registry)
        self.inter_token_latency = metrics.INTER_TOKEN_LATENCY.histogram(registry)
        self.duration = metrics.REQUEST_DURATION.histogram(registry)
        requests = metrics.REQUESTS.counter(registry)
        self.requests = {outcome: requests.labels(outcome) for outcome in _OUTCOMES}
        self.refusals = metrics.REFUSALS.counter(registry)
        self.prompt_tokens = metrics.PROMPT_TOKENS.counter(registry)
        self.cached_prompt_tokens = metrics.CACHED_PROMPT_TOKENS.counter(registry)
        self.generation_tokens = metrics.GENERATION_TOKENS.counter(registry)
        self.resumed = metrics.RESUMED.counter(registry)
        self.failovers = metrics.FAILOVERS.counter(registry)


class MeasuredRequest:
    """One request, which arrives now."""

    def __init__(self, of_all: RequestMetrics, span: RequestSpan = UNTRACED) -> None:
        self.span = span
        self._of_all = of_all
        self._arrived_at = time.perf_counter()
        self._token_at: float | None = None  # the latest
        self._tokens = 0

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around whatever may refuse the request before it is admitted."""
        try:
            yield
        except InfiniteLLMError as error:
            self.ended(error.reason)
            raise

    def admitted(self, prompt_tokens: int) -> None:
        self._of_all.prompt_tokens.inc(prompt_tokens)

    def resumed(self) -> None:
        self._of_all.resumed.inc()

    def tokens(self, count: int) -> None:
        """So many tokens came at once."""
        now = time.perf_counter()
        if self._token_at is None:
            self._of_all.time_to_first_token.observe(now - self._arrived_at)
            self.span.first_token(now - self._arrived_at)
        else:
            self._of_all.inter_token_latency.observe(now - self._token_at)
        self._token_at = now
        self._of_all.generation_tokens.inc(count)
        self._tokens += count

    def lost_instance(self) -> None:
        self._of_all.failovers.inc()
        self.span.lost_instance()

    def answered(self, cached_tokens: int) -> None:
        """The answer is complete; so much of its prompt was not computed."""
        self._of_all.cached_prompt_tokens.inc(cached_tokens)
        self._of_all.duration.observe(time.perf_counter() - self._arrived_at)
        self.span.answered(cached_tokens)

    def ended(self, state: str) -> None:
        """Once, however it ended: "stop", "length", "aborted" or an error's reason."""
        refused = state not in _OUTCOMES
        self._of_all.requests[_REFUSED if refused else state].inc()
        if refused:
            self._of_all.refusals.labels(state).inc()
        self.span.ended(state, refused, self._tokens)
