"""gRPC servers: size limits, keepalive, mutual TLS, and one interceptor: who may call, traces, errors as statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Tracer

from services.core.errors import ConfigError, InfiniteLLMError
from services.runtime.access import check_caller
from services.runtime.addresses import split_address, split_listen_address
from services.runtime.grpc_errors import error_message, error_metadata, status_code
from services.runtime.tls import MutualTls
from services.runtime.tracing import call_span, incoming_context

log = logging.getLogger(__name__)

# A prompt of 2M token ids is about 10 MB as protobuf; a daemon's full report of a large pool may be larger.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every few seconds, also without a call in flight (grpc_channel.py); never punish them for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server notices a stopped client in the same way.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


def make_server(tls: MutualTls | None = None, tracer: Tracer | None = None) -> aio.Server:
    """A server with the project's options and interceptor; add services, ``bind`` with the same ``tls``, then start it.

    With ``tls``, a caller is let through to what its role may call (``access.py``). With ``tracer``, a unary call that
    is made for a traced request has a span.
    """
    return aio.server(interceptors=[CallInterceptor(tls, tracer or NoOpTracer())], options=_OPTIONS)


def bind(server: aio.Server, address: str, *, tls: MutualTls | None = None, allow_insecure: bool = False) -> str:
    """Binds ``host:port`` (port 0: any free one) and answers the address with the real port.

    Raises:
        ConfigError: the address is not host:port, not loopback without TLS, or taken; or a certificate is of no use.
    """
    host, port = split_listen_address(address, allow_insecure) if tls is None else split_address(address)
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as exc:
        raise ConfigError(f"cannot listen on {address}: is the port taken by another process?") from exc
    if bound == 0 or (port != 0 and bound != port):
        raise ConfigError(f"cannot listen on {address}: is the port taken by another process?")
    return f"{host}:{bound}"


class CallInterceptor(aio.ServerInterceptor):
    """Lets in who may call, and ends a call whose handler raises with the error's status and ErrorInfo. The handler
    runs in the caller's trace, where its metadata name one.

    An ``InfiniteLLMError`` is an answer and is not logged here. Anything else is a bug: it is logged with its traceback
    and answered as INTERNAL without details.
    """

    def __init__(self, tls: MutualTls | None, tracer: Tracer) -> None:
        self._tls = tls
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return None
        method, tls = str(handler_call_details.method), self._tls
        caller = incoming_context(handler_call_details.invocation_metadata or ())
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(handler.stream_stream, method, tls, caller), **coders
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, method, tls, caller), **coders)
        if handler.stream_unary:
            behaviour = _unary(handler.stream_unary, method, tls, self._tracer, caller)
            return grpc.stream_unary_rpc_method_handler(behaviour, **coders)
        behaviour = _unary(handler.unary_unary, method, tls, self._tracer, caller)
        return grpc.unary_unary_rpc_method_handler(behaviour, **coders)


def _unary(behaviour: Any, method: str, tls: MutualTls | None, tracer: Tracer, caller: Context | None) -> Any:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        try:
            if tls is not None:
                check_caller(tls, method, context.auth_context())
            with call_span(tracer, method, caller):
                return await behaviour(request, context)
        except Exception as exc:
            await _abort(context, exc, method)

    return call


def _streaming(behaviour: Any, method: str, tls: MutualTls | None, caller: Context | None) -> Any:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        if caller is not None:
            otel_context.attach(caller)  # for good: the call has a task, and so a context, of its own
        # A handler is an async generator, or a coroutine that writes to the context itself.
        try:
            if tls is not None:
                check_caller(tls, method, context.auth_context())
            result = behaviour(request, context)
            if asyncio.iscoroutine(result):
                await result
                return
            async for response in result:
                yield response
        except Exception as exc:
            await _abort(context, exc, method)

    return call


async def _abort(context: aio.ServicerContext[Any, Any], exc: Exception, method: str) -> None:
    if isinstance(exc, aio.AbortError):  # the handler called context.abort itself
        raise exc
    if isinstance(exc, InfiniteLLMError):
        await context.abort(status_code(exc), error_message(exc), tuple(error_metadata(exc)))
    log.error("call failed", exc_info=exc, extra={"method": method})
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error in {method}; see the service's log")
