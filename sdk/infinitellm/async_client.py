"""``AsyncClient``: ``infinitellm.client`` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, Unpack

import grpc
from grpc import aio

from infinitellm._gateways import CHANNEL_OPTIONS, AsyncGateway, Gateways, addresses_of, metadata_of
from infinitellm._messages import Collected, cluster_status_of, error_of, event_of, generate_request
from infinitellm.batch import Outcome, run_batch_async
from infinitellm.client import BATCH_CONCURRENCY, GENERATE_TIMEOUT_S, RETRIES, STATUS_TIMEOUT_S
from infinitellm.errors import InfiniteLLMError
from infinitellm.retry import Attempts, GenerationStream, RetryPolicy, ended_early
from infinitellm.types import (
    ClusterStatus,
    Completion,
    Event,
    GenerationOptions,
    Prompt,
    SamplingOptions,
)
from infinitellm.v1 import cluster_pb2, inference_pb2

_AsyncGenerateCall = (
    aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
    | aio.UnaryStreamCall[inference_pb2.ResumeRequest, inference_pb2.GenerateResponse]
)


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
        self._metadata = metadata_of(api_key)
        self._retry = retry
        self._channels = [
            aio.insecure_channel(one, CHANNEL_OPTIONS)
            if credentials is None
            else aio.secure_channel(one, credentials, CHANNEL_OPTIONS)
            for one in addresses_of(address)
        ]
        self._gateways = Gateways([AsyncGateway(channel) for channel in self._channels])

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int = 0,
        prompt_logprobs: int = 0,
        progress: bool = False,
        model: str = "",
        timeout_s: float = GENERATE_TIMEOUT_S,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Event, None]:
        """See ``Client.generate``. Leave the generator early by ``aclose()`` or ``contextlib.aclosing``."""
        request = generate_request(
            prompt,
            max_tokens,
            temperature,
            seed,
            ignore_eos,
            logprobs,
            prompt_logprobs,
            sampling,
            progress=progress,
            model=model,
        )
        stream = GenerationStream(request, Attempts(self._retry, timeout_s))
        gateway = self._gateways.current
        return self._events(stream, gateway, self._call(stream, gateway))

    def _call(self, stream: GenerationStream, gateway: AsyncGateway) -> _AsyncGenerateCall:
        request, timeout_s = stream.next_request(), stream.timeout_s()
        if isinstance(request, inference_pb2.ResumeRequest):
            return gateway.inference.Resume(request, timeout=timeout_s, metadata=self._metadata)
        return gateway.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)

    async def _events(
        self, stream: GenerationStream, gateway: AsyncGateway, call: _AsyncGenerateCall
    ) -> AsyncGenerator[Event, None]:
        while True:
            try:
                async for response in call:
                    if (event := stream.take(event_of(response))) is not None:
                        yield event
                if stream.finished:
                    return
                error: InfiniteLLMError = ended_early()
            except aio.AioRpcError as failure:
                error = error_of(failure)
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
        collected = Collected()
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
                return cluster_status_of(
                    await gateway.cluster.GetClusterStatus(
                        cluster_pb2.GetClusterStatusRequest(), timeout=attempts.timeout_s(), metadata=self._metadata
                    )
                )
            except aio.AioRpcError as failure:
                error = error_of(failure)
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
