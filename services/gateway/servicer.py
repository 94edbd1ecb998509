"""The public gRPC API: protobuf in, GenerationService and ClusterState, protobuf out."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc.aio

from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.core.errors import InvalidRequestError
from services.core.placement import PoolStats
from services.core.shaping import LogitShaping
from services.core.structure import Structure
from services.gateway.cluster import ClusterState, InstanceView, KvDaemonView, RequestView
from services.gateway.generation import Generation
from services.gateway.generation_service import Asker, GenerationService
from services.gateway.gmanager_client import GManagerClient
from services.gateway.openai_types import MAX_LOGPROBS
from services.gateway.position import START
from services.gateway.requests import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    Event,
    Finished,
    NewTokens,
    PositionLogprobs,
    Progress,
    PromptLogprobs,
    Repeated,
    Sampling,
)
from services.runtime.api_keys import ApiKeys

Context = grpc.aio.ServicerContext[Any, Any]

_FINISH_REASON = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """``Generate`` and ``Resume``. Cancelling the call cancels the handler, which ends the request."""

    def __init__(self, service: GenerationService, keys: ApiKeys | None) -> None:
        self._service = service
        self._keys = keys

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        asker = Asker(_check_key(self._keys, context))
        sampling, received = _sampling(request.sampling), list(request.received.ids)
        if received and sampling.temperature > 0 and sampling.seed is None:
            raise InvalidRequestError("received: above temperature 0 the same sampling.seed is needed to go on")
        started = self._service.start(request.model, _prompt(request), sampling, request.progress, asker, received)
        async with aclosing(_answer(started)) as responses:
            async for response in responses:
                yield response

    async def Resume(
        self, request: inference_pb2.ResumeRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        key_name, received = _check_key(self._keys, context), list(request.received.ids)
        resumed = self._service.resume(request.request_id, key_name, START.after(received), received)
        async with aclosing(_answer(resumed)) as responses:
            async for response in responses:
                yield response


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """``GetClusterStatus``, from what the gManager knows."""

    def __init__(self, gmanager: GManagerClient, model: str, keys: ApiKeys | None) -> None:
        self._keys = keys
        self._gmanager = gmanager
        self._model = model

    async def GetClusterStatus(
        self, request: cluster_pb2.GetClusterStatusRequest, context: Context
    ) -> cluster_pb2.GetClusterStatusResponse:
        _check_key(self._keys, context)
        return _cluster_status(await self._gmanager.cluster_state(), self._model)


async def _answer(
    generation_context: AbstractAsyncContextManager[Generation],
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    async with generation_context as generation, aclosing(generation.events()) as events:
        async for event in events:
            for response in _responses(generation.request.request_id, event):
                yield response


def _check_key(keys: ApiKeys | None, context: Context) -> str:
    """The name of the caller's key; "" where none is asked for."""
    if keys is None:
        return ""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    return keys.name_of(metadata.get("authorization"))


def _prompt(request: inference_pb2.GenerateRequest) -> str | list[int]:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "token_ids":
        return list(request.token_ids.ids)
    raise InvalidRequestError("prompt: set text or token_ids")


def _sampling(sampling: inference_pb2.SamplingParams) -> Sampling:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequestError("sampling.temperature: must be finite and not negative")
    if sampling.max_tokens < 1 and not sampling.prompt_logprobs:
        raise InvalidRequestError("sampling.max_tokens: must be at least 1; 0 is for prompt_logprobs alone")
    for name, wanted in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if wanted > MAX_LOGPROBS:
            raise InvalidRequestError(f"sampling.{name}: at most {MAX_LOGPROBS}, got {wanted}")
    return Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed if sampling.HasField("seed") else None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        shaping=LogitShaping(
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            min_tokens=sampling.min_tokens,
            repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
        ),
        stop_token_ids=tuple(sampling.stop_token_ids),
        stop=_stop(sampling.stop),
        include_stop=sampling.include_stop_str_in_output,
        structure=_structure(sampling),
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _stop(stop: Sequence[str]) -> tuple[str, ...]:
    if len(stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
        raise InvalidRequestError(f"sampling.stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stop)


def _structure(sampling: inference_pb2.SamplingParams) -> Structure | None:
    kind = sampling.WhichOneof("structure")
    return None if kind is None else Structure(kind, getattr(sampling, kind), f"sampling.{kind}")


def _responses(request_id: str, event: Event) -> list[inference_pb2.GenerateResponse]:
    if isinstance(event, Progress):
        progress = inference_pb2.PrefillProgress(computed_tokens=event.computed, prompt_tokens=event.total)
        return [inference_pb2.GenerateResponse(request_id=request_id, progress=progress)]
    if isinstance(event, PromptLogprobs):
        scored = inference_pb2.PromptLogprobs(first=event.first, logprobs=map(_logprobs, event.logprobs))
        return [inference_pb2.GenerateResponse(request_id=request_id, prompt_logprobs=scored)]
    if isinstance(event, NewTokens):
        return [inference_pb2.GenerateResponse(request_id=request_id, tokens=_tokens(event, event.text))]
    if isinstance(event, Repeated):
        return []
    responses = []
    if event.text:
        rest = _tokens(NewTokens((), (), ()), event.text)
        responses.append(inference_pb2.GenerateResponse(request_id=request_id, tokens=rest))
    responses.append(inference_pb2.GenerateResponse(request_id=request_id, finished=_finished(event)))
    return responses


def _tokens(tokens: NewTokens, text: str) -> inference_pb2.GeneratedTokens:
    return inference_pb2.GeneratedTokens(ids=tokens.ids, text=text, logprobs=map(_logprobs, tokens.logprobs))


def _logprobs(position: PositionLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=position.logprob, top_ids=position.top_ids, top_logprobs=position.top_logprobs
    )


def _finished(finished: Finished) -> inference_pb2.GenerationFinished:
    return inference_pb2.GenerationFinished(
        reason=_FINISH_REASON[finished.reason],
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        cached_tokens=finished.cached_tokens,
    )


def _cluster_status(state: ClusterState, model: str) -> cluster_pb2.GetClusterStatusResponse:
    return cluster_pb2.GetClusterStatusResponse(
        instances=[_instance(view) for view in state.instances],
        kvdaemons=[_kvdaemon(view) for view in state.kvdaemons],
        requests=[_request(view) for view in state.requests],
        models=[model],
        gmanagers=[
            cluster_pb2.GManagerStatus(gmanager_id=view.gmanager_id, address=view.address, leads=view.leads)
            for view in state.gmanagers
        ],
    )


def _instance(view: InstanceView) -> cluster_pb2.InstanceStatus:
    return cluster_pb2.InstanceStatus(
        instance_id=view.instance_id,
        address=view.address,
        local_kvdaemon_id=view.local_kvdaemon_id,
        running_requests=view.running,
        waiting_requests=view.waiting,
        heartbeat_age_s=view.heartbeat_age_s,
        transports=[
            cluster_pb2.PeerTransport(kvdaemon_id=kvdaemon_id, transport=transport)
            for kvdaemon_id, transport in view.transports
        ],
    )


def _kvdaemon(view: KvDaemonView) -> cluster_pb2.KvDaemonStatus:
    return cluster_pb2.KvDaemonStatus(
        kvdaemon_id=view.kvdaemon_id,
        address=view.address,
        pool_bytes=view.stats.pool_bytes,
        block_bytes=view.stats.block_bytes,
        use=_pool_use(view.stats),
        heartbeat_age_s=view.heartbeat_age_s,
    )


def _pool_use(stats: PoolStats) -> cluster_pb2.PoolUse:
    return cluster_pb2.PoolUse(
        total=stats.total,
        free=stats.free,
        cached=stats.cached,
        workspace=stats.workspace,
        reserved=stats.reserved,
        in_use=stats.in_use,
    )


def _request(view: RequestView) -> cluster_pb2.RequestStatus:
    return cluster_pb2.RequestStatus(
        request_id=view.request_id,
        instance_id=view.instance_id,
        placement=[
            cluster_pb2.BlockPlacement(kvdaemon_id=entry.kvdaemon_id, num_blocks=entry.num_blocks, local=entry.local)
            for entry in view.placement
        ],
    )
