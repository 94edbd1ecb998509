"""One admitted request: its events, from one instance after another, until it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from services.core.errors import (
    InfiniteLLMError,
    PeerLostError,
    ResyncRequiredError,
    ShuttingDownError,
    TakenOverError,
    UnavailableError,
)
from services.gateway.detokenizer import Detokenizer
from services.gateway.instance_client import Attempt
from services.gateway.journal import Journal
from services.gateway.position import START, Position
from services.gateway.request_metrics import MeasuredRequest
from services.gateway.requests import (
    Ended,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    InstanceEvent,
    NewTokens,
    PositionLogprobs,
    Progress,
    PromptLogprobs,
    Repeated,
    TokensDrawn,
)
from services.gateway.router import Router
from services.gateway.stop_strings import StopStrings

logger = logging.getLogger(__name__)

# Pause before a request goes elsewhere for the n-th time in a row: n times this.
FAILOVER_PAUSE_S = 0.1


class Generation:
    """One admitted request.

    Args:
        known: the beginning of the answer, generated before, here or elsewhere.
        received: how much of the answer the client has; it may be more than is known. Who has any of it has been told
            all that there is to tell of the prompt.
    """

    def __init__(
        self,
        request: GenerationRequest,
        detokenizer: Detokenizer,
        router: Router,
        journal: Journal,
        instance_wait_s: float,
        max_failovers: int,
        measured: MeasuredRequest,
        known: Sequence[int],
        received: Position,
    ) -> None:
        self.request = request
        self.instance_id = ""  # where it was placed last
        self._repeated = START  # of what the client has: how much has been generated again
        self._detokenizer = detokenizer
        self._stops = StopStrings(request.stop, request.include_stop)
        self._router = router
        self._journal = journal
        self._instance_wait_s = instance_wait_s
        self._max_failovers = max_failovers
        self._measured = measured
        self._known = known
        self._received = received
        self._generated: list[int] = []
        # Tokens of the prompt, from its beginning, whose log-probabilities the client has or does not want.
        self._scored = 1 if request.prompt_logprobs and not received.count else len(request.prompt_ids)
        self._cached_tokens = 0
        self._attempt: Attempt | None = None
        self._taken_over = False
        self._log = {"request_id": request.request_id}

    async def events(self, first: Generation | None = None) -> AsyncGenerator[Event, None]:
        """Everything the client is told, Finished last. Call once; close it (``aclosing``) to end the request early.

        Args:
            first: the first choice, where this is another one.
        Raises: the error that the instance answered; NoInstanceError; UnavailableError; ResyncRequiredError where the
            client has other tokens; TakenOverError when another gateway goes on with the request.
        """
        state = "aborted"
        self._journal.started(self.request, self._lose)
        logger.info("request accepted", extra={**self._log, "prompt_tokens": len(self.request.prompt_ids)})
        try:
            if self._known:
                old = self._tell(self._known, ())
                self._journal.tokens(self.request.tenure, 0, self._generated)  # the client may have more than it has
                for event in old:
                    yield event
            ended = Ended("stop")  # by a stop string: the instance would have said at its end
            if not self._stops.found:
                async with aclosing(self._instance_events(first)) as events:
                    async for came in events:
                        if isinstance(came, TokensDrawn):
                            for event in self._take(came):
                                yield event
                            if self._stops.found:  # leaving ends the request at the instance, too
                                break
                        elif isinstance(came, PromptLogprobs):
                            if (untold := self._untold(came)).logprobs:
                                yield untold
                        elif isinstance(came, Progress):
                            yield came
                        else:
                            ended = came
            if self._received.count > len(self._generated):
                raise other_tokens()
            state = ended.reason
            finished = self._finished(ended.reason)
            self._measured.answered(finished.cached_tokens)
            yield finished
        except InfiniteLLMError as exc:
            state = exc.reason
            raise
        finally:
            self._journal.ended(self.request.tenure, state)
            self._measured.ended(state)
            extra = {**self._log, "state": state, "completion_tokens": len(self._generated)}
            logger.info("request ended", extra=extra)

    def _lose(self) -> None:
        """Another gateway goes on with the request: this one must not."""
        self._taken_over = True
        if self._attempt is not None:
            self._attempt.put(self._taken_over_error())

    def _taken_over_error(self) -> TakenOverError:
        return TakenOverError(f"the stream of {self.request.request_id} was resumed elsewhere")

    async def _instance_events(self, first: Generation | None) -> AsyncGenerator[InstanceEvent, None]:
        """The events of one instance after another, as if it were one; ends with Ended."""
        losses = 0
        avoid: frozenset[str] = frozenset()
        while (reason := self._reason_to_end()) is None:
            attempt = self._attempt = await self._router.place(
                self.request if self._scores else replace(self.request, prompt_logprobs=0),
                self._generated,
                self._instance_wait_s,
                avoid,
                near=first.instance_id if first is not None else "",
            )
            self.instance_id = attempt.instance_id
            self._measured.span.placed(attempt.instance_id)
            logger.info("request placed", extra={**self._log, "instance": attempt.instance_id})
            try:
                while True:
                    if self._taken_over:
                        raise self._taken_over_error()
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
                self._attempt = None
                attempt.close()
            await asyncio.sleep(FAILOVER_PAUSE_S * (losses - 1))
        # The instance was lost between the last token and its word that it was the last.
        yield Ended(reason)

    @property
    def _scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        return self._scored < len(self.request.prompt_ids)

    def _reason_to_end(self) -> FinishReason | None:
        if self._scores:
            return None
        if self._generated and self._generated[-1] in self.request.stop_token_ids:
            return "stop"
        return "length" if len(self._generated) >= self.request.max_tokens else None

    def _untold(self, came: PromptLogprobs) -> PromptLogprobs:
        """What the client has not been told of it: after a loss, a prompt is computed from its beginning again."""
        told = self._scored - came.first
        untold = came if told <= 0 else PromptLogprobs(self._scored, came.logprobs[told:])
        self._scored += len(untold.logprobs)
        return untold

    def _take(self, drawn: TokensDrawn) -> Iterator[Event]:
        """What an instance drew, up to the token that completes a stop string: journalled, then told."""
        self._cached_tokens = drawn.cached_tokens
        first = len(self._generated)
        events = self._tell(drawn.ids, drawn.logprobs)
        new = self._generated[first:]
        self._journal.tokens(self.request.tenure, first, new)
        self._measured.tokens(len(new))
        return iter(events)

    def _tell(self, ids: Sequence[int], logprobs: tuple[PositionLogprobs, ...]) -> list[Event]:
        """Tokens as the client is told of them: those that it has are only checked."""
        texts: list[str] = []
        told = len(self._generated)
        for token in ids:
            self._generated.append(token)
            texts.append(self._text(token))
            if self._stops.found:
                break
        ids = tuple(ids[: len(texts)])
        repeated = min(len(ids), max(0, self._received.count - told))
        events: list[Event] = []
        if repeated:
            self._repeated = self._repeated.after(ids[:repeated])
            if self._repeated.count == self._received.count and self._repeated != self._received:
                raise other_tokens()
            events.append(Repeated(tuple(texts[:repeated])))
        if repeated < len(ids):
            events.append(NewTokens(ids[repeated:], tuple(texts[repeated:]), logprobs[repeated : len(ids)]))
        return events

    def _text(self, token_id: int) -> str:
        """What a token adds to the text; the one that ends the answer is no part of it."""
        text = "" if token_id in self.request.stop_token_ids else self._detokenizer.push(token_id)
        return self._stops.push(text, counts=len(self._generated) > self.request.shaping.min_tokens)

    def _last_text(self) -> str:
        """What was held back and comes after all. Half a character completes no stop string."""
        return self._stops.push(self._detokenizer.flush(), counts=False) + self._stops.flush()

    def _finished(self, reason: FinishReason) -> Finished:
        return Finished(
            reason=reason,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self._generated),
            # After a continuation elsewhere, generated tokens are found in the cluster as well.
            cached_tokens=min(self._cached_tokens, len(self.request.prompt_ids)),
            text="" if self._stops.found else self._last_text(),
        )


def other_tokens() -> ResyncRequiredError:
    return ResyncRequiredError("the tokens received are not the beginning of this answer; send the request again")
