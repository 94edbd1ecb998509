"""The public API's messages as the SDK's types, and back."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import grpc
from grpc import aio

from infinitellm._rpc_errors import error_from_status
from infinitellm.errors import InfiniteLLMError, InvalidRequestError
from infinitellm.types import (
    BlockPlacement,
    ClusterStatus,
    Completion,
    Event,
    Finished,
    FinishReason,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PeerTransport,
    PoolUse,
    Progress,
    PromptLogprobs,
    RequestStatus,
    SamplingOptions,
    TokenLogprobs,
    Tokens,
)
from infinitellm.v1 import cluster_pb2, inference_pb2

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


class Collected:
    """A stream's events as one answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self._texts.append(event.text)
            self._ids += event.ids
            self._logprobs += event.logprobs
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs += event.logprobs
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
            tuple(self._prompt_logprobs),
        )


def generate_request(
    prompt: str | Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int | None,
    ignore_eos: bool,
    logprobs: int,
    prompt_logprobs: int,
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
            prompt_logprobs=prompt_logprobs,
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


def event_of(response: inference_pb2.GenerateResponse) -> Event:
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
    if response.HasField("prompt_logprobs"):
        scored = response.prompt_logprobs
        return PromptLogprobs(response.request_id, scored.first, _logprobs(scored.logprobs))
    tokens = response.tokens
    return Tokens(response.request_id, tuple(tokens.ids), tokens.text, _logprobs(tokens.logprobs))


def _logprobs(positions: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(position.logprob, tuple(position.top_ids), tuple(position.top_logprobs)) for position in positions
    )


def cluster_status_of(response: cluster_pb2.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        instances=tuple(
            InstanceStatus(
                instance_id=instance.instance_id,
                address=instance.address,
                local_kvdaemon_id=instance.local_kvdaemon_id,
                running_requests=instance.running_requests,
                waiting_requests=instance.waiting_requests,
                heartbeat_age_s=instance.heartbeat_age_s,
                transports=tuple(PeerTransport(peer.kvdaemon_id, peer.transport) for peer in instance.transports),
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


def error_of(error: grpc.RpcError) -> InfiniteLLMError:
    if isinstance(error, grpc.Call | aio.AioRpcError):
        metadata: Iterable[tuple[str, str | bytes]] | None = error.trailing_metadata()
        return error_from_status(error.code(), error.details(), metadata)
    return InfiniteLLMError(str(error))
