"""The life of a request, independent of HTTP and gRPC: admitted, placed, continued elsewhere, ended.

    async with service.start(model, prompt, sampling) as generation:
        async for event in generation.events(): ...

Whoever leaves that block early (a client that disconnects) ends the request at its instance.

A request survives its instances. Its state is the prompt, the tokens received so far and the seed; when an instance is
lost, exactly these go to another one, and the client's stream goes on with no token twice or missing. It survives its
gateway the same way: the journal has that state, and whichever gateway the client comes back to goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer, Tracer

from services.core.errors import (
    ContextTooLongError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    ResyncRequiredError,
)
from services.gateway.checkpoint import Checkpoint
from services.gateway.choices import choice_of
from services.gateway.generation import Generation, other_tokens
from services.gateway.journal import Journal
from services.gateway.position import START, Position
from services.gateway.request_metrics import MeasuredRequest, RequestMetrics
from services.gateway.request_span import RequestSpan
from services.gateway.requests import GenerationRequest, Operation, Prompt, Sampling
from services.gateway.router import Router
from services.gateway.tokenizer import Tokenizer
from services.runtime.grammars import Grammars

logger = logging.getLogger(__name__)

_NO_IDS: Sequence[int] = ()
# Of all positions and choices: an answer that shows them at once is some tens of megabytes of JSON then.
MOST_PROMPT_LOGPROBS = 2**19


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and in which form.

    Attributes:
        key_name: of the API key; "" where none is asked for.
        rendering, operation, choices: see GenerationRequest.
    """

    key_name: str = ""
    rendering: str = ""
    operation: Operation = "text_completion"
    choices: int = 1


ANYBODY = Asker()


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

    @property
    def resumable(self) -> bool:
        """Whether a stream that breaks off can be resumed."""
        return self._journal.resumable

    @asynccontextmanager
    async def start(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        progress: bool = False,
        asker: Asker = ANYBODY,
        received: Sequence[int] = _NO_IDS,
    ) -> AsyncIterator[Generation]:
        """Admits a request; it is in work until the block is left.

        Args:
            received: tokens of the answer that the client has from another gateway; they are not sent again.
        Raises: ModelNotFoundError, QueueFullError, InvalidRequestError, ContextTooLongError.
        """
        measured = self._measured(asker.operation)
        with measured.refusals():
            self.check_model(model)
        with self._in_work(measured):
            with measured.refusals():
                request = measured.span.of(await self._admit(prompt, sampling, progress, asker))
                self._check_received(request, received)
            measured.admitted(len(request.prompt_ids))
            yield self._generation(request, received, START.after(received), measured)

    @asynccontextmanager
    async def start_choice(self, first: GenerationRequest, index: int) -> AsyncIterator[Generation]:
        """Another choice of a request that was started; else as ``start``. Raises QueueFullError."""
        measured = self._measured(first.operation)
        with self._in_work(measured):
            request = measured.span.of(choice_of(first, index))
            measured.admitted(len(request.prompt_ids))
            yield self._generation(request, _NO_IDS, START, measured)

    @asynccontextmanager
    async def resume(
        self, request_id: str, key_name: str, received: Position, received_ids: Sequence[int] = _NO_IDS
    ) -> AsyncIterator[Generation]:
        """Takes a request over, whoever had it, and goes on behind what the client has; else as ``start``.

        Args:
            key_name: of the API key; only the one that began the request resumes it.
            received: how much of the answer the client has.
            received_ids: these tokens, where they are known; the journal may not have all of them.
        Raises: RequestNotFoundError, JournalUnavailableError, ResyncRequiredError, QueueFullError, InvalidRequestError.
        """
        measured = self._measured("text_completion")
        with self._in_work(measured):
            with measured.refusals():
                request, journalled = await self._journal.take_over(request_id, key_name)
                if request.model != self.checkpoint.name:
                    raise ResyncRequiredError(f"the request was for the model {request.model!r}; send it again")
                self._check_received(request, received_ids)
                known = _known(request, journalled, received, received_ids)
            measured.resumed()
            yield self._resumed(request, known, received, measured)

    @asynccontextmanager
    async def resume_choice(
        self, first: GenerationRequest, index: int, received: Position
    ) -> AsyncIterator[Generation]:
        """Another choice of a request that was resumed, which may not have begun before; else as ``resume``."""
        measured, choice = self._measured(first.operation), choice_of(first, index)
        with self._in_work(measured):
            with measured.refusals():
                request, journalled = await self._journal.take_over(choice.request_id, choice.key_name, choice)
            yield self._resumed(request, _known(request, journalled, received, _NO_IDS), received, measured)

    def _measured(self, operation: Operation) -> MeasuredRequest:
        return MeasuredRequest(self._metrics, RequestSpan(self._tracer, operation, self.checkpoint.name))

    @contextmanager
    def _in_work(self, measured: MeasuredRequest) -> Iterator[None]:
        """Around a request's life here. Raises QueueFullError."""
        with measured.refusals():
            if self._active >= self._max_queue:
                raise QueueFullError(f"{self._active} requests are in work already; try again later")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    def _resumed(
        self, request: GenerationRequest, known: Sequence[int], received: Position, measured: MeasuredRequest
    ) -> Generation:
        request = measured.span.of(request)
        logger.info("request taken over", extra={"request_id": request.request_id, "generated": len(known)})
        return self._generation(request, known, received, measured)

    def _check_received(self, request: GenerationRequest, received: Sequence[int]) -> None:
        """Of what a client says that it has."""
        if len(received) > request.max_tokens:
            raise InvalidRequestError(f"received: {len(received)} tokens are more than max_tokens {request.max_tokens}")
        if received and max(received) >= self.checkpoint.vocab_size:
            raise InvalidRequestError(
                f"received: token id {max(received)} is not in the vocabulary of {self.checkpoint.vocab_size} tokens"
            )

    def _generation(
        self, request: GenerationRequest, known: Sequence[int], received: Position, measured: MeasuredRequest
    ) -> Generation:
        return Generation(
            request,
            self.tokenizer.detokenizer(request.prompt_ids),
            self._router,
            self._journal,
            self._instance_wait_s,
            self._max_failovers,
            measured,
            known,
            received,
        )

    async def _admit(self, prompt: Prompt, sampling: Sampling, progress: bool, asker: Asker) -> GenerationRequest:
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
        at_each = (1 + sampling.prompt_logprobs) * asker.choices if sampling.prompt_logprobs else 0
        if len(prompt_ids) * at_each > MOST_PROMPT_LOGPROBS:
            raise InvalidRequestError(
                f"prompt log-probabilities: {at_each} for each of the prompt's {len(prompt_ids)} tokens are more than "
                f"{MOST_PROMPT_LOGPROBS}; ask for fewer at each, or for fewer choices, or shorten the prompt"
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
            prompt_logprobs=sampling.prompt_logprobs,
            model=self.checkpoint.name,
            rendering=asker.rendering,
            key_name=asker.key_name,
            operation=asker.operation,
            choices=asker.choices,
        )


def _known(
    request: GenerationRequest, journalled: Sequence[int], received: Position, received_ids: Sequence[int]
) -> Sequence[int]:
    """The beginning of an answer, from the journal and from the client, whoever has more."""
    if len(received_ids) > len(journalled):
        if tuple(received_ids[: len(journalled)]) != tuple(journalled):
            raise other_tokens()
        return received_ids
    # Log-probabilities are not journalled: what the client has not seen is drawn again, with them.
    return journalled[: received.count] if request.logprobs or request.prompt_logprobs else journalled
