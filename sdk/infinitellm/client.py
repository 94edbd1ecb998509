"""``Client`` and ``AsyncClient``: the public gRPC API of a gateway as typed calls.

Every call has a deadline (``timeout_s``), and a gateway that is stopped or unreachable is noticed within seconds by
unanswered pings. Errors are those of ``infinitellm.errors``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc
from grpc import aio

from infinitellm._rpc_errors import error_from_status
from infinitellm.errors import InfiniteLLMError, InvalidRequestError
from infinitellm.types import (
    BlockPlacement,
    ClusterStatus,
    Event,
    Finished,
    FinishReason,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PoolUse,
    Progress,
    RequestStatus,
    SamplingOptions,
    TokenLogprobs,
    Tokens,
)
from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

GENERATE_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 10.0

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


class _GenerateCall(Protocol):
    """What a streaming call of a synchronous channel offers."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...

    def cancel(self) -> object: ...


class Client:
    """A connection to a gateway for threads; any number of them may use it. Close it, or use it in ``with``."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials | None = None, api_key: str | None = None
    ) -> None:
        """
        Args:
            address: host:port of the gateway's gRPC server.
            credentials: TLS; None connects without.
            api_key: sent with every call, where the gateway asks for one. Without TLS anybody on the way reads it.
        """
        self._metadata = _metadata(api_key)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, _CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

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

        Closing the generator (``close()``, or ``contextlib.closing``) before its end cancels the request.

        Args:
            prompt: a text, or token ids.
            max_tokens: tokens to generate at most.
            temperature: 0 always takes the most probable token.
            seed: equal seeds draw equal tokens; None lets the gateway choose one.
            ignore_eos: go on after the end-of-sequence token.
            logprobs: with every token, the log-probabilities of this many most probable ones (0-20).
            progress: also answer ``Progress`` while the prompt is computed.
            model: name of the served model; empty means the only one.
            timeout_s: of the whole call.
            sampling: what else changes how tokens are drawn, see ``SamplingOptions``.

        Raises:
            InfiniteLLMError: from here if the request cannot be written, otherwise from the generator.
        """
        request = _generate_request(
            prompt, max_tokens, temperature, seed, ignore_eos, logprobs, sampling, progress=progress, model=model
        )
        return self._events(self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata))

    @staticmethod
    def _events(call: _GenerateCall) -> Generator[Event, None, None]:
        try:
            for response in call:
                yield _event(response)
        except grpc.RpcError as error:
            raise _error(error) from error
        finally:
            call.cancel()

    def cluster_status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """What the gManager knows of instances, pools and running requests."""
        try:
            return _cluster_status(
                self._cluster.GetClusterStatus(
                    cluster_pb2.GetClusterStatusRequest(), timeout=timeout_s, metadata=self._metadata
                )
            )
        except grpc.RpcError as error:
            raise _error(error) from error

    def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """``Client`` for asyncio; belongs to the event loop it is made in. Close it, or use it in ``async with``."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials | None = None, api_key: str | None = None
    ) -> None:
        """See ``Client``."""
        self._metadata = _metadata(api_key)
        if credentials is None:
            self._channel = aio.insecure_channel(address, _CHANNEL_OPTIONS)
        else:
            self._channel = aio.secure_channel(address, credentials, _CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

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
        return self._events(self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata))

    @staticmethod
    async def _events(
        call: aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
    ) -> AsyncGenerator[Event, None]:
        try:
            async for response in call:
                yield _event(response)
        except aio.AioRpcError as error:
            raise _error(error) from error
        finally:
            call.cancel()

    async def cluster_status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ClusterStatus:
        """See ``Client.cluster_status``."""
        try:
            return _cluster_status(
                await self._cluster.GetClusterStatus(
                    cluster_pb2.GetClusterStatusRequest(), timeout=timeout_s, metadata=self._metadata
                )
            )
        except aio.AioRpcError as error:
            raise _error(error) from error

    async def close(self) -> None:
        """Cancels what is running and closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


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
