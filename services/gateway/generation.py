"""The life of a request, independent of HTTP and gRPC: admitted, placed, continued elsewhere, ended.

    async with service.start(model, prompt, sampling) as generation:
        async for event in generation.events(): ...

Whoever leaves that block early (a client that disconnects) ends the request at its instance.

A request survives its instances. Its state is the prompt, the tokens received so far and the seed; when an instance is
lost, exactly these go to another one, and the client's stream goes on with no token twice or missing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from opentelemetry.trace import NoOpTracer, Tracer

from services.core.errors import (
    ContextTooLongError,
    InfiniteLLMError,
    InvalidRequestError,
    ModelNotFoundError,
    PeerLostError,
    QueueFullError,
    ShuttingDownError,
    UnavailableError,
)
from services.gateway.checkpoint import Checkpoint
from services.gateway.detokenizer import Detokenizer
from services.gateway.journal import Journal
from services.gateway.request_metrics import MeasuredRequest, RequestMetrics
from services.gateway.request_span import Operation, RequestSpan
from services.gateway.requests import (
    Ended,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    InstanceEvent,
    NewTokens,
    Progress,
    Prompt,
    Sampling,
    TokensDrawn,
)
from services.gateway.router import Router
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import Tokenizer
from services.runtime.grammars import Grammars

logger = logging.getLogger(__name__)

# Pause before a request goes elsewhere for the n-th time in a row: n times this.
FAILOVER_PAUSE_S = 0.1


class GenerationService:
    """Admits requests and runs them.

    Args:
        instance_wait_s: how long a request waits for an instance, at first and after each loss.
        max_failovers: losses in a row, without a token between, after which a request fails.
        max_queue: requests in work at most.
        tracer: makes the requests' spans.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        router: Router,
        journal: Journal,
        instance_wait_s: float,
        max_failovers: int,
        max_queue: int,
        metrics: RequestMetrics,
        tracer: Tracer | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self._grammars = Grammars(checkpoint.directory, checkpoint.vocab_size)
        self._router = router
        self._journal = journal
        self._instance_wait_s = instance_wait_s
        self._max_failovers = max_failovers
        self._max_queue = max_queue
        self._metrics = metrics
        self._tracer = tracer or NoOpTracer()
        self._active = 0

    @property
    def active(self) -> int:
        """Requests in work."""
        return self._active

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together, at most."""
        of_instances = self._router.max_model_len
        return min(self.checkpoint.max_model_len, of_instances) if of_instances else self.checkpoint.max_model_len

    def check_model(self, model: str) -> None:
        """Raises ModelNotFoundError; "" means the only one."""
        if model not in ("", self.checkpoint.name):
            raise ModelNotFoundError(
                f"the model {model!r} does not exist; this cluster serves {self.checkpoint.name!r}"
            )

    @asynccontextmanager
    async def start(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        progress: bool = False,
        operation: Operation = "text_completion",
    ) -> AsyncIterator[Generation]:
        """Admits a request; it is in work until the block is left.

        Raises: ModelNotFoundError, QueueFullError, InvalidRequestError, ContextTooLongError.
        """
        measured = MeasuredRequest(self._metrics, RequestSpan(self._tracer, operation, self.checkpoint.name))
        with measured.refusals():
            self.check_model(model)
            if self._active >= self._max_queue:
                raise QueueFullError(f"{self._active} requests are in work already; try again later")
        self._active += 1
        try:
            with measured.refusals():
                request = measured.span.of(await self._admit(prompt, sampling, progress))
            generation = Generation(
                request,
                self.tokenizer.detokenizer(request.prompt_ids),
                self._router,
                self._journal,
                self._instance_wait_s,
                self._max_failovers,
                measured,
            )
            yield generation
        finally:
            self._active -= 1

    async def _admit(self, prompt: Prompt, sampling: Sampling, progress: bool) -> GenerationRequest:
        prompt_ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not prompt_ids:
            raise InvalidRequestError("prompt: must have at least one token")
        if (largest := max(prompt_ids)) >= self.checkpoint.vocab_size or min(prompt_ids) < 0:
            wrong = largest if largest >= self.checkpoint.vocab_size else min(prompt_ids)
            raise InvalidRequestError(
                f"prompt: token id {wrong} is not in the vocabulary of {self.checkpoint.vocab_size} tokens"
            )
        limit = self.max_model_len
        if len(prompt_ids) + sampling.max_tokens > limit:
            raise ContextTooLongError(
                f"the prompt's {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} are together more than "
                f"this model's limit of {limit} tokens; shorten the prompt or ask for fewer tokens"
            )
        sampling.shaping.check(self.checkpoint.vocab_size, sampling.max_tokens)
        if sampling.stop and not self.tokenizer.has_text:
            raise InvalidRequestError("stop: this model has no tokenizer, so there is no text; use stop_token_ids")
        wrong_stops = [token for token in sampling.stop_token_ids if not 0 <= token < self.checkpoint.vocab_size]
        if wrong_stops:
            raise InvalidRequestError(
                f"stop_token_ids: token id {wrong_stops[0]} is not in the vocabulary of "
                f"{self.checkpoint.vocab_size} tokens"
            )
        stop_token_ids = (*(() if sampling.ignore_eos else self.checkpoint.eos_ids), *sampling.stop_token_ids)
        if sampling.structure is not None:
            if not stop_token_ids:
                raise InvalidRequestError(
                    f"{sampling.structure.asked_by}: needs a token that ends the answer: leave ignore_eos out, or give "
                    "stop_token_ids"
                )
            await asyncio.to_thread(self._grammars.start, sampling.structure)
        return GenerationRequest(
            request_id=f"cmpl-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            stop_token_ids=stop_token_ids,
            logprobs=sampling.logprobs,
            progress=progress,
            arrival_time=time.time(),
            shaping=sampling.shaping,
            stop=sampling.stop,
            include_stop=sampling.include_stop,
            structure=sampling.structure,
        )


class Generation:
    """One admitted request."""

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        router: Router,
        journal: Journal,
        instance_wait_s: float,
        max_failovers: int,
        measured: MeasuredRequest,
    ) -> None:
        self.request = request
        self._detokenizer = detokenizer
        self._stops = StopStrings(request.stop, request.include_stop)
        self._router = router
        self._journal = journal
        self._instance_wait_s = instance_wait_s
        self._max_failovers = max_failovers
        self._measured = measured
        self._generated: list[int] = []
        self._log = {"request_id": request.request_id}

    async def events(self) -> AsyncGenerator[Event, None]:
        """Everything the client is told, Finished last. Call once; close it (``aclosing``) to end the request early.

        Raises: the error that the instance answered; NoInstanceError; UnavailableError.
        """
        state = "aborted"
        self._journal.started(self.request)
        self._measured.admitted(len(self.request.prompt_ids))
        logger.info("request accepted", extra={**self._log, "prompt_tokens": len(self.request.prompt_ids)})
        try:
            async with aclosing(self._instance_events()) as events:
                async for event in events:
                    if isinstance(event, TokensDrawn):
                        new = self._take(event)
                        self._measured.tokens(len(new.ids))
                        yield new
                        if self._stops.found:  # leaving ends the request at the instance, too
                            state = "stop"
                            self._measured.answered(cached_tokens=0)  # the instance would have said at its end
                            yield self._finished(Ended("stop", cached_tokens=0))
                            return
                    elif isinstance(event, Progress):
                        yield event
                    else:
                        state = event.reason
                        finished = self._finished(event)
                        self._measured.answered(finished.cached_tokens)
                        yield finished
        except InfiniteLLMError as exc:
            state = exc.reason
            raise
        finally:
            self._journal.ended(self.request.request_id, state)
            self._measured.ended(state)
            extra = {**self._log, "state": state, "completion_tokens": len(self._generated)}
            logger.info("request ended", extra=extra)

    async def _instance_events(self) -> AsyncGenerator[InstanceEvent, None]:
        """The events of one instance after another, as if it were one; ends with Ended."""
        losses = 0
        avoid: frozenset[str] = frozenset()
        while (reason := self._reason_to_end()) is None:
            attempt = await self._router.place(self.request, self._generated, self._instance_wait_s, avoid)
            self._measured.span.placed(attempt.instance_id)
            logger.info("request placed", extra={**self._log, "instance": attempt.instance_id})
            try:
                while True:
                    event = await attempt.next()
                    yield event
                    if isinstance(event, Ended):
                        return
                    if isinstance(event, TokensDrawn):
                        losses = 0
            except (PeerLostError, ShuttingDownError) as exc:
                losses += 1
                self._measured.lost_instance()
                extra = {**self._log, "instance": attempt.instance_id, "generated": len(self._generated)}
                logger.warning("request lost its instance: %s", exc, extra=extra)
                if losses > self._max_failovers:
                    raise UnavailableError(
                        f"the request was lost by {losses} instances in a row; the last said: {exc}"
                    ) from exc
                avoid = frozenset((attempt.instance_id,))
            finally:
                attempt.close()
            await asyncio.sleep(FAILOVER_PAUSE_S * (losses - 1))
        # The instance was lost between the last token and its word that it was the last.
        yield Ended(reason, cached_tokens=0)

    def _reason_to_end(self) -> FinishReason | None:
        if self._generated and self._generated[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self._generated) >= self.request.max_tokens else None

    def _take(self, event: TokensDrawn) -> NewTokens:
        """New tokens up to the one that completes a stop string."""
        first = len(self._generated)
        texts = []
        for token in event.ids:
            self._generated.append(token)
            texts.append(self._text(token))
            if self._stops.found:
                break
        ids = tuple(self._generated[first:])
        self._journal.tokens(self.request.request_id, first, ids)
        return NewTokens(ids, tuple(texts), event.logprobs[: len(ids)])

    def _text(self, token_id: int) -> str:
        """What a token adds to the text; the one that ends the answer is no part of it."""
        text = "" if token_id in self.request.stop_token_ids else self._detokenizer.push(token_id)
        return self._stops.push(text, counts=len(self._generated) > self.request.shaping.min_tokens)

    def _last_text(self) -> str:
        """What was held back and comes after all. Half a character completes no stop string."""
        return self._stops.push(self._detokenizer.flush(), counts=False) + self._stops.flush()

    def _finished(self, ended: Ended) -> Finished:
        return Finished(
            reason=ended.reason,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self._generated),
            # After a continuation elsewhere, generated tokens are found in the cluster as well.
            cached_tokens=min(ended.cached_tokens, len(self.request.prompt_ids)),
            text="" if self._stops.found else self._last_text(),
        )
