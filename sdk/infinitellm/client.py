"""``Client``: the public gRPC API of a gateway as typed calls; ``AsyncClient`` is its like for asyncio.

Every call has a deadline (``timeout_s``), and a gateway that is stopped or unreachable is noticed within seconds by
unanswered pings. What may pass is tried again, at the next gateway where several are named: a stream that broke off
goes on where it stood (``infinitellm.retry``). Errors are those of ``infinitellm.errors``.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc

from infinitellm._gateways import CHANNEL_OPTIONS, Gateway, Gateways, addresses_of, metadata_of
from infinitellm._messages import Collected, cluster_status_of, error_of, event_of, generate_request
from infinitellm.batch import Outcome, run_batch
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

GENERATE_TIMEOUT_S = 600.0
STATUS_TIMEOUT_S = 10.0
BATCH_CONCURRENCY = 16
RETRIES = RetryPolicy()


class _GenerateCall(Protocol):
    """What a streaming call of a synchronous channel offers."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...

    def cancel(self) -> object: ...


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
        self._metadata = metadata_of(api_key)
        self._retry = retry
        self._channels = [
            grpc.insecure_channel(one, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(one, credentials, CHANNEL_OPTIONS)
            for one in addresses_of(address)
        ]
        self._gateways = Gateways([Gateway(channel) for channel in self._channels])

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
    ) -> Generator[Event, None, None]:
        """Generates a continuation; the request is on its way when this returns. The last event is ``Finished``.

        Closing the generator (``close()``, or ``contextlib.closing``) before its end cancels the request. If the
        gateway is lost, the stream goes on at the next one with no token lost or doubled; ``request_id`` may change.

        Args:
            prompt: a text, or token ids.
            max_tokens: tokens to generate at most; with ``prompt_logprobs`` it may be 0.
            temperature: 0 always takes the most probable token.
            seed: equal seeds draw equal tokens; None lets the gateway choose one.
            ignore_eos: go on after the end-of-sequence token.
            logprobs: with every token, the log-probabilities of this many most probable ones (0-20).
            prompt_logprobs: likewise for the prompt's tokens, in ``PromptLogprobs`` before the first ``Tokens``.
            progress: also answer ``Progress`` while the prompt is computed.
            model: name of the served model; empty means the only one.
            timeout_s: of the whole stream, whatever it takes.
            sampling: what else changes how tokens are drawn, see ``SamplingOptions``.

        Raises:
            InfiniteLLMError: from here if the request cannot be written, otherwise from the generator.
        """
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

    def _call(self, stream: GenerationStream, gateway: Gateway) -> _GenerateCall:
        request, timeout_s = stream.next_request(), stream.timeout_s()
        if isinstance(request, inference_pb2.ResumeRequest):
            return gateway.inference.Resume(request, timeout=timeout_s, metadata=self._metadata)
        return gateway.inference.Generate(request, timeout=timeout_s, metadata=self._metadata)

    def _events(self, stream: GenerationStream, gateway: Gateway, call: _GenerateCall) -> Generator[Event, None, None]:
        while True:
            try:
                for response in call:
                    if (event := stream.take(event_of(response))) is not None:
                        yield event
                if stream.finished:
                    return
                error: InfiniteLLMError = ended_early()
            except grpc.RpcError as failure:
                error = error_of(failure)
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
        collected = Collected()
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
                return cluster_status_of(
                    gateway.cluster.GetClusterStatus(
                        cluster_pb2.GetClusterStatusRequest(), timeout=attempts.timeout_s(), metadata=self._metadata
                    )
                )
            except grpc.RpcError as failure:
                error = error_of(failure)
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
