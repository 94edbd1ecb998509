"""One instance, as the gateway uses it: one stream that carries all requests there and all their tokens back.

The stream is opened again for ever after it broke. An *attempt* is one request on one stream; when the stream ends, or
says nothing for ``stream_timeout_s`` (a stopped instance keeps its sockets), every attempt on it ends with
``PeerLostError`` after the events that had come, and the request's owner goes elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import grpc.aio

from infinitellm.internal.v1 import instance_pb2, instance_pb2_grpc
from services.core.errors import InfiniteLLMError, PeerLostError, all_errors
from services.core.placement import AdmissionHint
from services.core.shaping import UNSHAPED, LogitShaping
from services.gateway.requests import (
    Ended,
    GenerationRequest,
    InstanceEvent,
    PositionLogprobs,
    Progress,
    PromptLogprobs,
    TokensDrawn,
)
from services.runtime.cancelling import cancel
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.tls import MutualTls

logger = logging.getLogger(__name__)

Outgoing = asyncio.Queue[instance_pb2.ServeRequest | None]  # None: the stream is over
Call = grpc.aio.StreamStreamCall[instance_pb2.ServeRequest, instance_pb2.ServeResponse]

PING_INTERVAL_S = 1.0
MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class Attempt:
    """One request at one instance. Use ``next`` until Ended or an error, then ``close``."""

    def __init__(self, client: InstanceClient, request_id: str, num_tokens: int) -> None:
        self.instance_id = client.instance_id
        self.num_tokens = num_tokens
        self._client = client
        self._request_id = request_id
        self._events: deque[InstanceEvent | InfiniteLLMError] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of the owner, while there is no event

    def put(self, event: InstanceEvent | InfiniteLLMError) -> None:
        """Called by the client, in the order of the stream; nothing comes after Ended or an error."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> InstanceEvent:
        """The next event. Raises what the instance answered, or PeerLostError when the stream ended."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, InfiniteLLMError):
            raise event
        return event

    def close(self) -> None:
        """The request is over for its owner; the instance is told unless it knows."""
        self._client.forget(self._request_id, self)


class InstanceClient:
    """The stream to one instance.

    Args:
        on_change: called whenever ``ready`` may have changed or load went down.
        tls: the gateway's own identity.
    """

    def __init__(
        self,
        instance_id: str,
        address: str,
        gateway_id: str,
        stream_timeout_s: float,
        on_change: Callable[[], None],
        tls: MutualTls | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.address = address
        # An instance that is no longer listed keeps what it has and gets nothing new.
        self.retired = False
        self.local_free_blocks = 0
        self.max_model_len = 0
        self.hint: AdmissionHint | None = None
        self.room_tokens = 0  # of the hint, less what has been submitted since it came
        self._gateway_id = gateway_id
        self._stream_timeout_s = stream_timeout_s
        self._on_change = on_change
        self._tls = tls
        self._attempts: dict[str, Attempt] = {}
        self._outstanding_tokens = 0
        self._outgoing: Outgoing | None = None
        self._ready = False
        self._last_heard = 0.0
        self._backoff_s = MIN_BACKOFF_S
        self._task = asyncio.create_task(self._run(), name=f"instance {instance_id}")

    @property
    def ready(self) -> bool:
        """The stream is open and the instance has spoken on it."""
        return self._ready

    @property
    def outstanding_requests(self) -> int:
        return len(self._attempts)

    @property
    def in_use(self) -> bool:
        """The stream is open and carries requests."""
        return self._ready and bool(self._attempts)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens of all unfinished requests at their submission: what the instance has to prefill or hold."""
        return self._outstanding_tokens

    def take_hint(self, hint: AdmissionHint | None) -> None:
        """What the latest plan says of this instance. One that is told again is no news."""
        if hint != self.hint:
            self.hint = hint
            self.room_tokens = 0 if hint is None else hint.room_tokens

    def submit(self, request: GenerationRequest, generated: Sequence[int]) -> Attempt:
        """Sends a request, with the tokens generated elsewhere before. Only while ``ready``."""
        assert self._outgoing is not None
        request_id = request.instance_request_id
        attempt = Attempt(self, request_id, len(request.prompt_ids) + len(generated))
        self._attempts[request_id] = attempt
        self._outstanding_tokens += attempt.num_tokens
        self.room_tokens -= attempt.num_tokens
        self._outgoing.put_nowait(instance_pb2.ServeRequest(submit=_submission(request, generated)))
        return attempt

    def forget(self, request_id: str, attempt: Attempt) -> None:
        """Ends an attempt; aborts it at the instance if it was still running there."""
        if self._attempts.get(request_id) is not attempt:
            return
        self._drop(request_id)
        if self._outgoing is not None:
            abort = instance_pb2.AbortRequest(request_id=request_id)
            self._outgoing.put_nowait(instance_pb2.ServeRequest(abort=abort))

    async def close(self) -> None:
        """Ends the stream, and with it every attempt."""
        await cancel([self._task])

    async def _run(self) -> None:
        while True:
            reason = "the stream ended"
            try:
                await self._serve()
            except grpc.aio.AioRpcError as exc:
                reason = str(error_from_rpc(exc))
            except PeerLostError as exc:
                reason = str(exc)
            except Exception:
                logger.exception("instance stream failed", extra={"instance": self.instance_id})
                reason = "an internal error of the gateway"
            finally:
                self._lost(reason)
            await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    async def _serve(self) -> None:
        """One stream, from hello to its end."""
        loop = asyncio.get_running_loop()
        outgoing: Outgoing = asyncio.Queue()
        hello = instance_pb2.GatewayHello(gateway_id=self._gateway_id)
        outgoing.put_nowait(instance_pb2.ServeRequest(hello=hello))
        self._last_heard = loop.time()
        async with make_channel(self.address, "instance", self._tls) as channel:
            call = instance_pb2_grpc.InstanceServiceStub(channel).Serve(_drain(outgoing))
            watchdog = asyncio.create_task(self._watch(call, outgoing))
            try:
                async for response in call:
                    self._last_heard = loop.time()
                    if not self._ready:
                        self._outgoing, self._ready = outgoing, True
                        self._backoff_s = MIN_BACKOFF_S
                        logger.info("instance connected", extra={"instance": self.instance_id, "address": self.address})
                        self._on_change()
                    self._dispatch(response)
            except asyncio.CancelledError:
                if watchdog.done() and not self._task.cancelling():
                    raise PeerLostError(f"it said nothing for {self._stream_timeout_s:g} s") from None
                raise
            finally:
                watchdog.cancel()
                call.cancel()
                outgoing.put_nowait(None)

    async def _watch(self, call: Call, outgoing: Outgoing) -> None:
        """Pings, and cancels the call when the instance has been silent for too long."""
        loop = asyncio.get_running_loop()
        interval_s = min(PING_INTERVAL_S, self._stream_timeout_s / 4)
        while True:
            before = loop.time()
            await asyncio.sleep(interval_s)
            now = loop.time()
            # If this process itself stood still, what the instance said meanwhile has not been read yet.
            stood_still = now - before > 2 * interval_s
            if not stood_still and now - self._last_heard > self._stream_timeout_s:
                call.cancel()
                return
            outgoing.put_nowait(instance_pb2.ServeRequest(ping=instance_pb2.ServePing()))

    def _dispatch(self, response: instance_pb2.ServeResponse) -> None:
        """One step's message: what is told of a prompt comes before a request's tokens, and these before its end."""
        for progress in response.progress:
            if attempt := self._attempts.get(progress.request_id):
                attempt.put(Progress(progress.computed_tokens, progress.total_tokens))
        for scored in response.prompt_logprobs:
            if attempt := self._attempts.get(scored.request_id):
                attempt.put(PromptLogprobs(scored.first, tuple(map(_position, scored.logprobs))))
        for tokens in response.tokens:
            if attempt := self._attempts.get(tokens.request_id):
                attempt.put(_tokens_drawn(tokens))
        for finished in response.finished:
            if attempt := self._drop(finished.request_id):
                attempt.put(Ended("length" if finished.reason == "length" else "stop"))
        for failed in response.failed:
            if attempt := self._drop(failed.request_id):
                attempt.put(all_errors().get(failed.reason, InfiniteLLMError)(failed.message))

    def _drop(self, request_id: str) -> Attempt | None:
        attempt = self._attempts.pop(request_id, None)
        if attempt is not None:
            self._outstanding_tokens -= attempt.num_tokens
            self._on_change()
        return attempt

    def _lost(self, reason: str) -> None:
        was_ready, self._ready, self._outgoing = self._ready, False, None
        error = PeerLostError(f"instance {self.instance_id}: {reason}")
        if was_ready:
            logger.warning("instance lost: %s", error, extra={"unfinished_requests": len(self._attempts)})
        for request_id in list(self._attempts):
            if attempt := self._drop(request_id):
                attempt.put(error)
        self._on_change()


async def _drain(outgoing: Outgoing) -> AsyncIterator[instance_pb2.ServeRequest]:
    while (message := await outgoing.get()) is not None:
        yield message


def _submission(request: GenerationRequest, generated: Sequence[int]) -> instance_pb2.SubmitRequest:
    return instance_pb2.SubmitRequest(
        request_id=request.instance_request_id,
        token_ids=[*request.prompt_ids, *generated],
        prompt_tokens=len(request.prompt_ids),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        logprobs=request.logprobs,
        progress=request.progress,
        arrival_time=request.arrival_time,
        shaping=None if request.shaping == UNSHAPED else _shaping(request.shaping),
        traceparent=request.traceparent,
        structure=None
        if request.structure is None
        else instance_pb2.Structure(kind=request.structure.kind, text=request.structure.text),
        prompt_logprobs=request.prompt_logprobs,
    )


def _shaping(shaping: LogitShaping) -> instance_pb2.LogitShaping:
    return instance_pb2.LogitShaping(
        logit_bias=dict(shaping.logit_bias),
        min_tokens=shaping.min_tokens,
        repetition_penalty=shaping.repetition_penalty,
        presence_penalty=shaping.presence_penalty,
        frequency_penalty=shaping.frequency_penalty,
        top_k=shaping.top_k,
        top_p=shaping.top_p,
        min_p=shaping.min_p,
    )


def _tokens_drawn(tokens: instance_pb2.StepTokens) -> TokensDrawn:
    return TokensDrawn(
        tuple(tokens.ids), tuple(map(_position, tokens.logprobs)) if tokens.logprobs else (), tokens.cached_tokens
    )


def _position(message: instance_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(message.logprob, tuple(message.top_ids), tuple(message.top_logprobs))
