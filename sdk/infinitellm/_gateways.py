"""Connections to one or several gateways, and what every call of them carries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import grpc
from grpc import aio

from infinitellm.errors import InfiniteLLMError, UnavailableError
from infinitellm.v1 import cluster_pb2_grpc, inference_pb2_grpc

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024  # prompts of millions of tokens
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A stopped gateway keeps its sockets; only unanswered pings show it. The first ping has a timeout of its own.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # gRPC would send even loopback addresses through http_proxy
)


class Gateway:
    """The stubs of one gateway."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


class AsyncGateway:
    """Likewise, for asyncio."""

    def __init__(self, channel: aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)


AnyGateway = TypeVar("AnyGateway", Gateway, AsyncGateway)


class Gateways(Generic[AnyGateway]):
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


def addresses_of(address: str | Sequence[str]) -> Sequence[str]:
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses:
        raise ValueError("address: name at least one gateway")
    return addresses


def metadata_of(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
