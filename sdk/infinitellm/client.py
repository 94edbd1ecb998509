"""``Client`` and ``AsyncClient``: the public gRPC API of a gateway as typed calls.

Every call has a deadline (``timeout_s``), and a gateway that is stopped or unreachable is noticed within seconds by
unanswered pings. What may pass is tried again, at the next gateway where several are named: a stream that broke off
goes on where it stood (``infinitellm.retry``). Errors are those of ``infinitellm.errors``.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar, Unpack

import grpc
from grpc import aio

from infinitellm._rpc_errors import error_from_status
from infinitellm.batch import Outcome, run_batch, run_batch_async
from infinitellm.errors import InfiniteLLMError, InvalidRequestError, UnavailableError
from infinitellm.retry import Attempts, GenerationStream, RetryPolicy, ended_early
from infinitellm.types import (
    BlockPlacement,
    ClusterStatus,
    Completion,
    Event,
    Finished,
    FinishReason,
    GenerationOptions,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PoolUse,
    Progress,
    Prompt,
    RequestStatus,
    SamplingOptions,
    TokenLogprobs,
    Tokens,
)
from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

GENERATE_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 10.0
BATCH_CONCURRENCY = 16
RETRIES = RetryPolicy()

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024  # prompts of millions of tokens
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A stopped gateway keeps its sockets; only unanswered pings show it. The first ping has a timeout of its own.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # gRPC would send even loopback addresses through http_proxy
)
_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


class _Gateway:
    """The stubs of one gateway."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


class _AsyncGateway:
    """Likewise, for asyncio."""

    def __init__(self, channel: aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


AnyGateway = TypeVar("AnyGateway", _Gateway, _AsyncGateway)


class _Gateways(Generic[AnyGateway]):
    """Those that a client knows: one is used until it fails, then the next."""

    def __init__(self, gateways: Iterable[AnyGateway]) -> None:
        self._gateways: Iterator[AnyGateway] = itertools.cycle(gateways)
        self.current: AnyGateway = next(self._gateways)
        self.closed = False

    def failed(self, gateway: AnyGateway) -> None:
        """A call to it has failed. Of several calls that fail at once, one changes to the next."""
        if gateway is self.current:
            self.current = next(self._gateways)

    def check_open(self, error: InfiniteLLMError) -> None:
        """Raises the error of a call that was ended by closing the client."""
        if self.closed:
            raise UnavailableError("the client is closed") from error


class _GenerateCall(Protocol):
    """What a streaming call of a synchronous channel offers."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...

    def cancel(self) -> object: ...


_AsyncGenerateCall = (
    aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
    | aio.UnaryStreamCall[inference_pb2.ResumeRequest, inference_pb2.GenerateResponse]
)


class Client:
    """Connections to one or several gateways, for any number of threads. Close it, or use it in ``with``."""

    def __init__(
        self,
        address: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        retry: RetryPolicy = RETRIES,
    ) -> None:
        """
        Args:
            address: host:port of the gateway's gRPC server; of several gateways, the first is used as long as it works.
            credentials: TLS; None connects without.
            api_key: sent with every call, where the gateway asks for one. Without TLS anybody on the way reads it.
            retry: what is done about errors that may pass.
        """
        self._metadata = _metadata(api_key)
        self._retry = retry
        self._channels = [
            grpc.insecure_channel(one, _CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(one, credentials, _CHANNEL_OPTIONS)
            for one in _addresses(address)
        ]
        self._gateways = _Gateways([_Gateway(channel) for channel in self._channels])

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int = 0,
        progress: bool = False,
        model: str = "",
        timeout_s: float = GENERATE_TIMEOUT_S,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Event, None, None]:
        """Generates a continuation; the request is on its way when this returns. The last event is ``Finished``.

        Closing the generator (``close()``, or ``contextlib.closing``) before its end cancels the request. If the
        gateway is lost, the stream goes on at the next one with no token lost or doubled; ``request_id`` may change.

        Args:
            prompt: a text, or token ids.
            max_tokens: tokens to generate at most.
            temperature: 0 always takes the most probable token.
            seed: equal seeds draw equal tokens; None lets the gateway choose one.
            ignore_eos: go on after the end-of-sequence token.
            logprobs: with every token, the log-probabilities of this many most probable ones (0-20).
            progress: also answer ``Progress`` while the prompt is computed.
            model: name of the served model; empty means the only one.
            timeout_s: of the whole stream, whatever it takes.
            sampling: what else changes how tokens are drawn, see ``SamplingOptions``.

        Raises:
            InfiniteLLMError: from here if the request cannot be written, otherwise from the generator.
        """
        request = _generate_request(
            prompt, max_tokens, temperature, seed, ignore_eos, logprobs, sampling, progress=progress, model=model
        )
        stream = GenerationStream(request, Attempts(self._retry, timeout_s))
        gateway = self._gateways.current
        return self._events(stream, gateway, self._call(stream, gateway))

    def _call(self, stream: GenerationStream, gateway: _Gateway) -> _GenerateCall:
        request, timeout_s = stream.next_request(), stream.timeout_s()
        if isinstance(request, inference_pb2.ResumeRequest):
            return gateway.inference.Resume(request, timeout=timeout_s, metadata=self._metadata)
        return gateway.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)

    def _events(self, stream: GenerationStream, gateway: _Gateway, call: _GenerateCall) -> Generator[Event, None, None]:
        while True:
            try:
                for response in call:
                    if (event := stream.take(_event(response))) is not None:
                        yield event
                if stream.finished:
                    return
                error: InfiniteLLMError = ended_early()
            except grpc.RpcError as failure:
                error = _error(failure)
                error.__cause__ = failure
            finally:
                call.cancel()
            self._gateways.check_open(error)
            self._gateways.failed(gateway)
            time.sleep(stream.pause_s(error))
            gateway = self._gateways.current
            call = self._call(stream, gateway)

    def complete(self, prompt: Prompt, *, max_tokens: int, **options: Unpack[GenerationOptions]) -> Completion:
        """The whole answer; else as ``generate``."""
        collected = _Collected()
        with closing(self.generate(prompt, max_tokens=max_tokens, **options)) as events:
            for event in events:
                collected.add(event)
        return collected.completion()

    def complete_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        concurrency: int = BATCH_CONCURRENCY,
        progress: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Outcome]:
        """Completes many prompts; the answers are in their order, and an error stands where it was raised.

        Args:
            concurrency: prompts under way at the same time.
            progress: draw a bar on stderr; None: if that is a terminal.
            options: for each prompt; ``timeout_s`` as well.
        """
        return run_batch(
            lambda prompt: self.complete(prompt, max_tokens=max_tokens, **options), prompts, concurrency, progress
        )

    def cluster_status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """What the gManager knows of instances, pools and running requests."""
        attempts = Attempts(self._retry, timeout_s)
        while True:
            gateway = self._gateways.current
            try:
                return _cluster_status(
                    gateway.cluster.GetClusterStatus(
                        cluster_pb2.GetClusterStatusRequest(), timeout=attempts.timeout_s(), metadata=self._metadata
                    )
                )
            except grpc.RpcError as failure:
                error = _error(failure)
                error.__cause__ = failure
            self._gateways.check_open(error)
            self._gateways.failed(gateway)
            time.sleep(attempts.pause_s(error))

    def close(self) -> None:
        """Cancels what is running and closes the connections."""
        self._gateways.closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """``Client`` for asyncio; belongs to the event loop it is made in. Close it, or use it in ``async with``."""

    def __init__(
        self,
        address: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
        retry: RetryPolicy = RETRIES,
    ) -> None:
        """See ``Client``."""
        self._metadata = _metadata(api_key)
        self._retry = retry
        self._channels = [
            aio.insecure_channel(one, _CHANNEL_OPTIONS)
            if credentials is None
            else aio.secure_channel(one, credentials, _CHANNEL_OPTIONS)
            for one in _addresses(address)
        ]
        self._gateways = _Gateways([_AsyncGateway(channel) for channel in self._channels])

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int = 0,
        progress: bool = False,
        model: str = "",
        timeout_s: float = GENERATE_TIMEOUT_S,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Event, None]:
        """See ``Client.generate``. Leave the generator early by ``aclose()`` or ``contextlib.aclosing``."""
        request = _generate_request(
            prompt, max_tokens, temperature, seed, ignore_eos, logprobs, sampling, progress=progress, model=model
        )
        stream = GenerationStream(request, Attempts(self._retry, timeout_s))
        gateway = self._gateways.current
        return self._events(stream, gateway, self._call(stream, gateway))

    def _call(self, stream: GenerationStream, gateway: _AsyncGateway) -> _AsyncGenerateCall:
        request, timeout_s = stream.next_request(), stream.timeout_s()
        if isinstance(request, inference_pb2.ResumeRequest):
            return gateway.inference.Resume(request, timeout=timeout_s, metadata=self._metadata)
        return gateway.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)

    async def _events(
        self, stream: GenerationStream, gateway: _AsyncGateway, call: _AsyncGenerateCall
    ) -> AsyncGenerator[Event, None]:
        while True:
            try:
                async for response in call:
                    if (event := stream.take(_event(response))) is not None:
                        yield event
                if stream.finished:
                    return
                error: InfiniteLLMError = ended_early()
            except aio.AioRpcError as failure:
                error = _error(failure)
                error.__cause__ = failure
            finally:
                call.cancel()
            self._gateways.check_open(error)
            self._gateways.failed(gateway)
            await asyncio.sleep(stream.pause_s(error))
            gateway = self._gateways.current
            call = self._call(stream, gateway)

    async def complete(self, prompt: Prompt, *, max_tokens: int, **options: Unpack[GenerationOptions]) -> Completion:
        """See ``Client.complete``."""
        collected = _Collected()
        async with aclosing(self.generate(prompt, max_tokens=max_tokens, **options)) as events:
            async for event in events:
                collected.add(event)
        return collected.completion()

    async def complete_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        concurrency: int = BATCH_CONCURRENCY,
        progress: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Outcome]:
        """See ``Client.complete_batch``."""
        return await run_batch_async(
            lambda prompt: self.complete(prompt, max_tokens=max_tokens, **options), prompts, concurrency, progress
        )

    async def cluster_status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """See ``Client.cluster_status``."""
        attempts = Attempts(self._retry, timeout_s)
        while True:
            gateway = self._gateways.current
            try:
                return _cluster_status(
                    await gateway.cluster.GetClusterStatus(
                        cluster_pb2.GetClusterStatusRequest(), timeout=attempts.timeout_s(), metadata=self._metadata
                    )
                )
            except aio.AioRpcError as failure:
                error = _error(failure)
                error.__cause__ = failure
            self._gateways.check_open(error)
            self._gateways.failed(gateway)
            await asyncio.sleep(attempts.pause_s(error))

    async def close(self) -> None:
        """Cancels what is running and closes the connections."""
        self._gateways.closed = True
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Collected:
    """A stream's events as one answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self._texts.append(event.text)
            self._ids += event.ids
            self._logprobs += event.logprobs
        elif isinstance(event, Finished):
            self._finished = event

    def completion(self) -> Completion:
        finished = self._finished
        assert finished is not None  # a stream ends with it, or with an error
        return Completion(
            finished.request_id,
            "".join(self._texts),
            tuple(self._ids),
            tuple(self._logprobs),
            finished.reason,
            finished.prompt_tokens,
            finished.cached_tokens,
        )


def _addresses(address: str | Sequence[str]) -> Sequence[str]:
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses:
        raise ValueError("address: name at least one gateway")
    return addresses


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _generate_request(
    prompt: str | Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int | None,
    ignore_eos: bool,
    logprobs: int,
    options: SamplingOptions,
    *,
    progress: bool,
    model: str,
) -> inference_pb2.GenerateRequest:
    if seed is None and temperature > 0:
        seed = secrets.randbits(64)  # chosen here, so that the request sent again is the same request
    try:
        sampling = inference_pb2.SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            **options,
        )
        request = inference_pb2.GenerateRequest(model=model, sampling=sampling, progress=progress)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.SetInParent()  # the empty list is a prompt too, which the gateway judges
            request.token_ids.ids.extend(prompt)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be written: {error}") from error
    return request


def _event(response: inference_pb2.GenerateResponse) -> Event:
    if response.HasField("progress"):
        return Progress(response.request_id, response.progress.computed_tokens, response.progress.prompt_tokens)
    if response.HasField("finished"):
        finished = response.finished
        return Finished(
            request_id=response.request_id,
            reason=_FINISH_REASONS[finished.reason],
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            cached_tokens=finished.cached_tokens,
        )
    tokens = response.tokens
    logprobs = tuple(
        TokenLogprobs(position.logprob, tuple(position.top_ids), tuple(position.top_logprobs))
        for position in tokens.logprobs
    )
    return Tokens(response.request_id, tuple(tokens.ids), tokens.text, logprobs)


def _cluster_status(response: cluster_pb2.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        instances=tuple(
            InstanceStatus(
                instance_id=instance.instance_id,
                address=instance.address,
                local_kvdaemon_id=instance.local_kvdaemon_id,
                running_requests=instance.running_requests,
                waiting_requests=instance.waiting_requests,
                heartbeat_age_s=instance.heartbeat_age_s,
            )
            for instance in response.instances
        ),
        kvdaemons=tuple(
            KvDaemonStatus(
                kvdaemon_id=daemon.kvdaemon_id,
                address=daemon.address,
                pool_bytes=daemon.pool_bytes,
                block_bytes=daemon.block_bytes,
                use=PoolUse(
                    total=daemon.use.total,
                    free=daemon.use.free,
                    cached=daemon.use.cached,
                    workspace=daemon.use.workspace,
                    reserved=daemon.use.reserved,
                    in_use=daemon.use.in_use,
                ),
                heartbeat_age_s=daemon.heartbeat_age_s,
            )
            for daemon in response.kvdaemons
        ),
        requests=tuple(
            RequestStatus(
                request_id=request.request_id,
                instance_id=request.instance_id,
                placement=tuple(
                    BlockPlacement(part.kvdaemon_id, part.num_blocks, part.local) for part in request.placement
                ),
            )
            for request in response.requests
        ),
        models=tuple(response.models),
        gmanagers=tuple(
            GManagerStatus(gmanager.gmanager_id, gmanager.address, gmanager.leads) for gmanager in response.gmanagers
        ),
    )


def _error(error: grpc.RpcError) -> InfiniteLLMError:
    if isinstance(error, grpc.Call | aio.AioRpcError):
        metadata: Iterable[tuple[str, str | bytes]] | None = error.trailing_metadata()
        return error_from_status(error.code(), error.details(), metadata)
    return InfiniteLLMError(str(error))
