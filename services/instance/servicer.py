"""The instance's gRPC side: requests of gateways in, their tokens out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, cast

from infinitellm.internal.v1 import instance_pb2 as pb
from infinitellm.internal.v1 import instance_pb2_grpc as rpc
from services.core.errors import ContextTooLongError, InfiniteLLMError, InvalidRequestError, ShuttingDownError
from services.core.sequence import Request, SamplingParams
from services.core.shaping import UNSHAPED, LogitShaping
from services.core.structure import Structure, StructureKind
from services.core.trace_context import parse_traceparent
from services.instance.control import Abort, AbortStream, Submit
from services.instance.engine import Engine
from services.instance.logprobs import TokenLogprobs
from services.instance.move_desk import MoveDesk, MoveInstruction
from services.instance.outputs import FailOutput, FinishOutput, Output, ProgressOutput, PromptOutput, TokenOutput
from services.runtime.grammars import Grammars

if TYPE_CHECKING:
    import grpc

_log = logging.getLogger(__name__)
_PING_INTERVAL_S = 1.0


class InstanceServicer(rpc.InstanceServiceServicer):
    """One stream per gateway; a step's outputs for a gateway travel in one message. The gManager has blocks moved."""

    def __init__(self, vocab_size: int, max_model_len: int, grammars: Grammars | None = None) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._engine: Engine | None = None
        self._moves: MoveDesk | None = None
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, asyncio.Queue[list[Output]]] = {}
        self._stream_ids = itertools.count(1)
        self._stopping = asyncio.Event()

    def serve(self, engine: Engine, moves: MoveDesk | None = None) -> None:
        """The engine runs; requests are taken from now on, and moves where there is who makes them."""
        self._engine, self._moves = engine, moves

    def stop(self) -> None:
        """Ends all streams, so that gateways go elsewhere."""
        self._stopping.set()

    def publish(self, outputs: list[Output]) -> None:
        """Takes a step's outputs; called by the engine thread."""
        self._loop.call_soon_threadsafe(self._distribute, outputs)

    async def Serve(
        self,
        request_iterator: AsyncIterator[pb.ServeRequest],
        context: grpc.aio.ServicerContext[pb.ServeRequest, pb.ServeResponse],
    ) -> AsyncIterator[pb.ServeResponse]:
        engine = self._engine
        if engine is None or self._stopping.is_set():
            raise ShuttingDownError("this instance takes no requests now")
        stream_id = next(self._stream_ids)
        outbox: asyncio.Queue[list[Output]] = asyncio.Queue()
        self._streams[stream_id] = outbox
        reader = asyncio.create_task(self._read(engine, stream_id, request_iterator, outbox))
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            yield pb.ServeResponse()  # the gateway counts this instance as connected from here on
            while not reader.done() and not stopped.done():
                outputs: list[Output] = []
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PING_INTERVAL_S):
                        outputs = await outbox.get()
                while not outbox.empty():
                    outputs += outbox.get_nowait()
                yield _response(outputs)  # empty: a sign of life
        finally:
            for task in (reader, stopped):
                task.cancel()
            await asyncio.gather(reader, stopped, return_exceptions=True)
            del self._streams[stream_id]
            engine.post(AbortStream(stream_id))

    async def MoveBlocks(
        self,
        request: pb.MoveBlocksRequest,
        context: grpc.aio.ServicerContext[pb.MoveBlocksRequest, pb.MoveBlocksResponse],
    ) -> pb.MoveBlocksResponse:
        moves = self._moves
        if moves is None or self._stopping.is_set():
            raise ShuttingDownError("this instance takes no instructions now")
        if not request.num_blocks or request.source_kvdaemon_id == request.destination_kvdaemon_id:
            raise InvalidRequestError(
                f"a move takes at least one block from one daemon to another, not {request.num_blocks} from "
                f"{request.source_kvdaemon_id!r} to {request.destination_kvdaemon_id!r}"
            )
        answer = await moves.instruct(
            MoveInstruction(
                request.move_id,
                request.fencing_token,
                request.request_id,
                request.source_kvdaemon_id,
                request.destination_kvdaemon_id,
                request.destination_address,
                request.num_blocks,
            )
        )
        return pb.MoveBlocksResponse(
            accepted_blocks=answer.accepted_blocks,
            refusal=answer.refusal or "",
            traceparent="" if answer.trace is None else answer.trace.traceparent,
        )

    async def _read(
        self,
        engine: Engine,
        stream_id: int,
        requests: AsyncIterator[pb.ServeRequest],
        outbox: asyncio.Queue[list[Output]],
    ) -> None:
        async for message in requests:
            match message.WhichOneof("request"):
                case "hello":
                    _log.info("gateway connected", extra={"gateway": message.hello.gateway_id, "stream": stream_id})
                case "submit":
                    try:
                        request = self._request(message.submit, stream_id)
                        structure = request.sampling.structure
                        if structure is not None and self._grammars is not None:
                            # Compiled here once, so that the engine's steps do not wait for it.
                            await asyncio.to_thread(self._grammars.start, structure)
                        engine.post(Submit(request))
                    except InfiniteLLMError as error:
                        outbox.put_nowait([FailOutput(message.submit.request_id, stream_id, error)])
                case "abort":
                    engine.post(Abort(message.abort.request_id, stream_id))

    def _request(self, message: pb.SubmitRequest, stream_id: int) -> Request:
        """Checks a submission; the gateway has done so before, but a wrong id here would end the engine."""
        tokens = tuple(message.token_ids)
        generated = len(tokens) - message.prompt_tokens
        if message.prompt_tokens < 1 or generated < 0:
            raise InvalidRequestError(f"prompt_tokens {message.prompt_tokens} does not fit {len(tokens)} token ids")
        if max(tokens) >= self._vocab_size:
            raise InvalidRequestError(f"token id {max(tokens)} is not below the vocabulary's size {self._vocab_size}")
        if message.max_tokens <= generated and not (generated == 0 and message.prompt_logprobs):
            raise InvalidRequestError(f"max_tokens {message.max_tokens} leaves nothing to generate")
        if message.temperature < 0 or not message.temperature < float("inf"):
            raise InvalidRequestError(f"temperature must be finite and not negative, got {message.temperature}")
        if len(tokens) + min(1, message.max_tokens) > self._max_model_len:
            raise ContextTooLongError(
                f"the prompt has {len(tokens)} tokens; the model's context holds {self._max_model_len} with the answer"
            )
        shaping = _shaping(message.shaping) if message.HasField("shaping") else UNSHAPED
        shaping.check(self._vocab_size, message.max_tokens)
        stops = frozenset(message.stop_token_ids)
        if stops and max(stops) >= self._vocab_size:
            raise InvalidRequestError(
                f"stop token id {max(stops)} is not below the vocabulary's size {self._vocab_size}"
            )
        structure = _structure(message.structure) if message.HasField("structure") else None
        sampling = SamplingParams(
            message.temperature,
            message.seed,
            message.max_tokens,
            stops,
            message.logprobs,
            shaping,
            structure,
            message.prompt_logprobs,
        )
        return Request(
            message.request_id,
            tokens,
            message.prompt_tokens,
            sampling,
            message.arrival_time,
            stream_id,
            message.progress,
            message.cache_salt,
            parse_traceparent(message.traceparent),
        )

    def _distribute(self, outputs: list[Output]) -> None:
        by_stream: dict[int, list[Output]] = {}
        for output in outputs:
            by_stream.setdefault(output.stream_id, []).append(output)
        for stream_id, part in by_stream.items():
            outbox = self._streams.get(stream_id)
            if outbox is not None:  # otherwise the gateway is gone, and its requests with it
                outbox.put_nowait(part)


def _shaping(message: pb.LogitShaping) -> LogitShaping:
    return LogitShaping(
        tuple(sorted(message.logit_bias.items())),
        message.min_tokens,
        message.repetition_penalty,
        message.presence_penalty,
        message.frequency_penalty,
        message.top_k,
        message.top_p,
        message.min_p,
    )


def _structure(message: pb.Structure) -> Structure:
    return Structure(cast(StructureKind, message.kind), message.text)


def _response(outputs: Iterable[Output]) -> pb.ServeResponse:
    response = pb.ServeResponse()
    for output in outputs:
        match output:
            case TokenOutput(request_id, _, token_id, logprobs, cached):
                told = [] if logprobs is None else [_logprobs(logprobs)]
                response.tokens.add(request_id=request_id, ids=[token_id], logprobs=told, cached_tokens=cached)
            case PromptOutput(request_id, _, first, scored):
                response.prompt_logprobs.add(request_id=request_id, first=first, logprobs=map(_logprobs, scored))
            case ProgressOutput(request_id, _, computed, total):
                response.progress.add(request_id=request_id, computed_tokens=computed, total_tokens=total)
            case FinishOutput(request_id, _, reason):
                response.finished.add(request_id=request_id, reason=reason)
            case FailOutput(request_id, _, error):
                response.failed.add(request_id=request_id, reason=error.reason, message=str(error))
    return response


def _logprobs(position: TokenLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(logprob=position.logprob, top_ids=position.top_ids, top_logprobs=position.top_logprobs)
