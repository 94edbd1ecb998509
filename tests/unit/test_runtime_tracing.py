"""Traces of a process: what is sampled, what a call carries, and a target that is away."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import threading
import time

import grpc.aio
import pytest
from spans import CALLER, Recorder, parent_of

from benchmarks.otlp_collector import OtlpCollector
from infinitellm.internal.v1 import kvdaemon_pb2, kvdaemon_pb2_grpc
from services.core.errors import ConfigError, PoolExhaustedError
from services.core.trace_context import TraceContext, parse_traceparent
from services.runtime import otlp
from services.runtime.config import parse_config
from services.runtime.grpc_server import bind, make_server
from services.runtime.tracing import TracingConfig, entered, make_tracing, outgoing_metadata, under

DEADLINE_S = 20.0
IDS = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
CONTEXT = TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)


@pytest.mark.parametrize("text", [f"00-{IDS}-01", f"00-{IDS}-03", f"cc-{IDS}-01-what-will-be"])
def test_a_sampled_traceparent(text: str) -> None:
    assert parse_traceparent(text) == CONTEXT
    assert parse_traceparent(CONTEXT.traceparent) == CONTEXT


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", f"00-{IDS}-00", f"00-{IDS}-02", f"ff-{IDS}-01", f"00-{IDS.upper()}-01", f"00-{IDS}-1"),
        *(f" 00-{IDS}-01", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01", f"00-{IDS}-01\n"),
    ],
)
def test_no_sampled_traceparent(text: str) -> None:
    assert parse_traceparent(text) is None


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, "endpoint is missing"),
        ({"endpoint": "collector:4317"}, "endpoint must be http"),
        ({"endpoint": "http://"}, "endpoint must be http"),
        ({"endpoint": "http://c:4317", "sampling_ratio": 1.5}, "sampling_ratio must be between 0 and 1, got 1.5"),
        ({"endpoint": "http://c:4317", "ratio": 1}, "unknown key ratio"),
    ],
)
def test_what_cannot_be_configured(keys: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parse_config(TracingConfig, keys)


def test_the_ratio_is_of_requests_that_nobody_has_decided_on() -> None:
    recorder = Recorder(sampling_ratio=0.25)
    for _ in range(2000):
        recorder.tracer.start_span("root").end()
    assert 350 < len(recorder.spans) < 650
    never = Recorder(sampling_ratio=0.0)
    never.tracer.start_span("root").end()
    never.tracer.start_span("child", under(CALLER)).end()
    (child,) = never.spans
    assert parent_of(child) == CALLER


def test_without_tracing_nothing_of_it_is_loaded() -> None:
    """The small image's services neither."""
    code = (
        "import sys, services.gateway.service, services.gmanager.service\n"
        "from services.runtime.tracing import make_tracing\n"
        "make_tracing(None, 'gateway', 'g', 'c').close()\n"
        "ours = ('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'torch')\n"
        "print(*[module for module in sys.modules if module.startswith(ours)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


class _Daemon(kvdaemon_pb2_grpc.KvDaemonServiceServicer):
    async def Reserve(self, request: kvdaemon_pb2.ReserveRequest, context: object) -> kvdaemon_pb2.ReserveResponse:
        if request.max_blocks:
            raise PoolExhaustedError("none is free")
        return kvdaemon_pb2.ReserveResponse()


def test_a_call_for_a_traced_request_has_a_span() -> None:
    recorder = Recorder(sampling_ratio=0.0)

    async def run() -> None:
        server = make_server(tracer=recorder.tracer)
        kvdaemon_pb2_grpc.add_KvDaemonServiceServicer_to_server(_Daemon(), server)
        address = bind(server, "127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            reserve = kvdaemon_pb2_grpc.KvDaemonServiceStub(channel).Reserve
            await reserve(kvdaemon_pb2.ReserveRequest(), timeout=DEADLINE_S, metadata=outgoing_metadata())
            with entered(CALLER):
                metadata = outgoing_metadata()
                await reserve(kvdaemon_pb2.ReserveRequest(), timeout=DEADLINE_S, metadata=metadata)
                with pytest.raises(grpc.aio.AioRpcError):
                    await reserve(kvdaemon_pb2.ReserveRequest(max_blocks=1), timeout=DEADLINE_S, metadata=metadata)
            assert outgoing_metadata() is None
            unsampled = (("traceparent", f"00-{IDS}-00"),)
            await reserve(kvdaemon_pb2.ReserveRequest(), timeout=DEADLINE_S, metadata=unsampled)
        await server.stop(grace=None)

    asyncio.run(run())
    served, failed = recorder.spans
    assert [parent_of(span) for span in (served, failed)] == [CALLER, CALLER]
    assert served.name == "infinitellm.internal.v1.KvDaemonService/Reserve"
    assert (served.status.is_ok, failed.status.is_ok) == (True, False)


def test_a_target_that_is_away_costs_spans_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracing = make_tracing(TracingConfig(f"http://127.0.0.1:{port}"), "gateway", "g", "c")
    more_than_fit = 3 * otlp._QUEUED_SPANS
    with caplog.at_level(logging.INFO):
        for number in range(more_than_fit):
            tracing.tracer.start_span("early", attributes={"number": number}).end()
        deadline = time.monotonic() + DEADLINE_S
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with OtlpCollector(port) as collector:
            while not collector.spans:
                tracing.tracer.start_span("late").end()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            _close(tracing.close)
            most = otlp._QUEUED_SPANS + otlp._BATCH_SPANS  # waiting, and in the exporter's hands
            assert len([span for span in collector.spans if span.name == "early"]) <= most
            assert {(span.service, span.member) for span in collector.spans} == {("gateway", "g")}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_target_that_hangs_does_not_keep_a_process_from_ending() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracing = make_tracing(TracingConfig(f"http://127.0.0.1:{silent.getsockname()[1]}"), "gateway", "g", "c")
        for _ in range(2 * otlp._QUEUED_SPANS):
            tracing.tracer.start_span("span").end()
        _close(tracing.close)


def _close(close: object) -> None:
    thread = threading.Thread(target=close, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_spans_of_the_same_trace_name_their_parents() -> None:
    with OtlpCollector() as collector:
        tracing = make_tracing(TracingConfig(collector.endpoint), "instance", "i", "c")
        with tracing.tracer.start_as_current_span("outer", under(CALLER)):
            tracing.tracer.start_span("inner", attributes={"many": (1, 2)}).end()
        _close(tracing.close)
        by_name = {span.name: span for span in collector.spans}
    assert by_name["inner"].parent_id == by_name["outer"].span_id
    assert by_name["outer"].parent_id == f"{CALLER.span_id:016x}"
    assert by_name["inner"].attributes == {"many": (1, 2)}
