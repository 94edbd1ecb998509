"""gRPC channels: a peer that is dead, or alive and stopped, is noticed within seconds.

A stopped process still has its sockets, so nothing but unanswered pings shows that it is gone. ``keepalive_*`` alone
does not do it: the first unanswered ping is covered by ``grpc.http2.ping_timeout_ms``, whose default is a minute.
"""

from __future__ import annotations

import asyncio

from grpc import aio

from services.runtime.grpc_errors import error_from_rpc
from services.runtime.grpc_server import MAX_MESSAGE_BYTES
from services.runtime.tls import MutualTls, Role

__all__ = ["call_was_given_up", "error_from_rpc", "make_channel"]

PING_INTERVAL_MS = 2_000
PING_TIMEOUT_MS = 3_000

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that comes back is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A channel of its own per peer: one stopped peer shares no connection with another.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


def make_channel(address: str, role: Role | None = None, tls: MutualTls | None = None) -> aio.Channel:
    """A channel to a service of the project at ``host:port``. Whoever makes it closes it.

    Args:
        role: what the other side must be; goes with ``tls``: the other side's certificate must say so.
        tls: the own identity, read anew for each channel. After a failure a new channel is made, not the old one used
            again, so that a rotated certificate is shown.

    Raises:
        ConfigError: a file of ``tls`` cannot be read.
    """
    if tls is None:
        return aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    assert role is not None, "with TLS, the other side's role must be named"
    # Addresses come and go, so the certificate is checked against the role's name.
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls.name_of(role)))
    return aio.secure_channel(address, tls.channel_credentials(), options=options)


def call_was_given_up() -> bool:
    """Asked about a ``CancelledError``: whether it stands for the call and not for the task that waits for it.

    Whoever closes a channel cancels all its calls, those of other tasks too; these must fail like any call, not vanish.
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling()
