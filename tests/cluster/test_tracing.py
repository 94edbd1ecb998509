"""One request's trace in a real cluster, taken by a real OTLP collector: connected through every process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cluster_process import Cluster
from moving import TOKEN, Mover
from spans import Recorder, parent_of
from test_serving import SMALL_ENGINE, prompt_of

from benchmarks.otlp_collector import CollectedSpan, OtlpCollector
from infinitellm.v1 import inference_pb2, inference_pb2_grpc
from services.core.trace_context import TraceContext
from services.gmanager.instance_client import InstanceClients, MoveAnswer, MoveOrder

pytestmark = pytest.mark.cluster

DEADLINE_S = 30.0
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LENDER = "kvdaemon-mem-0"
PROMPT_TOKENS, OUTPUT_TOKENS = 800, 40
MEMBERS = {("gateway", "gateway-0"), ("instance", "instance-0"), ("kvdaemon", LENDER), ("gmanager", "gmanager-0")}


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(
    random_llama: Path, tmp_path_factory: pytest.TempPathFactory, collector: OtlpCollector
) -> Iterator[Cluster]:
    """An instance with its daemon and a lender, whose own requests are not traced unless the client says so."""
    arguments = ("--instances", "1", "--kvdaemons", "1", "--pool-mib", "2", "--dtype", "float32")
    tracing = {"tracing": {"endpoint": collector.endpoint, "sampling_ratio": 0.0}}
    config = dict.fromkeys(("gateway", "gmanager", "kvdaemon"), tracing)
    config["instance"] = {**SMALL_ENGINE["instance"], **tracing}
    with Cluster(random_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=config) as cluster:
        yield cluster


def traced(cluster: Cluster, prompt: list[int], flags: str, max_tokens: int) -> str:
    """A completion of which the client says whether it is traced; answers its id."""
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-{flags}"}
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    response = cluster.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, f"{response.text}\n{cluster.logs()}"
    return str(response.json()["id"])


@pytest.fixture(scope="module")
def trace(cluster: Cluster, collector: OtlpCollector) -> list[CollectedSpan]:
    """All spans of one traced request whose prompt does not fit the instance's own pool."""
    untraced = prompt_of(PROMPT_TOKENS, seed=80)  # and opens the session with the lender
    cluster.complete(untraced, max_tokens=3)  # decided here: at a ratio of 0
    traced(cluster, untraced, "00", 3)  # decided by the client
    request_id = traced(cluster, prompt_of(PROMPT_TOKENS, seed=81), "01", OUTPUT_TOKENS)
    deadline = time.monotonic() + DEADLINE_S
    while {(span.service, span.member) for span in collector.trace(TRACE)} < MEMBERS or not _whole(collector):
        assert time.monotonic() < deadline, f"{collector.trace(TRACE)}\n{cluster.logs()}"
        time.sleep(0.1)
    spans = list(collector.trace(TRACE))
    (root,) = (span for span in spans if span.service == "gateway")
    assert root.attributes["gen_ai.response.id"] == request_id
    return spans


def _whole(collector: OtlpCollector) -> bool:
    names = {span.name for span in collector.trace(TRACE)}
    return names >= {"compute", "hosted attention"} and any(name.startswith("text_completion") for name in names)


def named(trace: list[CollectedSpan], name: str) -> list[CollectedSpan]:
    return [span for span in trace if span.name == name]


def test_the_trace_is_one_tree_of_all_processes(trace: list[CollectedSpan]) -> None:
    by_id = {span.span_id: span for span in trace}
    assert len(by_id) == len(trace)
    orphans = [span for span in trace if span.parent_id not in by_id]
    assert [(span.service, span.parent_id) for span in orphans] == [("gateway", CALLER)]
    (compute,) = named(trace, "compute")
    assert by_id[compute.parent_id].service == "gateway"
    for span in trace:
        if span is not compute and span.service != "gateway":
            assert span.parent_id == compute.span_id, span
    assert {(span.service, span.member) for span in trace} >= MEMBERS
    assert not any(span.error for span in trace)


def test_only_what_is_sampled_is_exported(trace: list[CollectedSpan], collector: OtlpCollector) -> None:
    assert {span.trace_id for span in collector.spans} == {TRACE}
    assert len(named(trace, "compute")) == 1


def test_the_gateway_tells_of_the_request(trace: list[CollectedSpan], cluster: Cluster) -> None:
    (root,) = (span for span in trace if span.service == "gateway")
    assert root.name == f"text_completion {cluster.model_name}"
    told = root.attributes
    assert told["gen_ai.operation.name"] == "text_completion"
    assert root.events == (("placed", {"infinite_llm.instance": "instance-0"}),)
    assert told["gen_ai.request.model"] == cluster.model_name
    assert told["gen_ai.request.max_tokens"] == told["gen_ai.usage.output_tokens"] == OUTPUT_TOKENS
    assert told["gen_ai.usage.input_tokens"] == PROMPT_TOKENS
    assert told["gen_ai.usage.cache_read.input_tokens"] == 0
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    first = told["gen_ai.response.time_to_first_chunk"]
    assert isinstance(first, float)
    assert 0 < first * 1e9 < root.ended_ns - root.begun_ns


def test_the_instance_tells_of_queue_prefill_and_decode(trace: list[CollectedSpan]) -> None:
    (compute,), (queue,), (decode,) = (named(trace, name) for name in ("compute", "queue", "decode"))
    chunks = sorted(named(trace, "prefill chunk"), key=lambda span: span.begun_ns)
    assert len(chunks) > 1
    assert [chunk.attributes["infinite_llm.context_tokens"] for chunk in chunks] == _sums(chunks)[:-1]
    assert _sums(chunks)[-1] == PROMPT_TOKENS
    assert decode.attributes["infinite_llm.steps"] == OUTPUT_TOKENS - 1  # the last chunk draws the first token
    remote = queue.attributes["infinite_llm.remote_blocks"]
    assert isinstance(remote, int)
    assert remote > 0
    stages = [queue, *chunks, decode]
    ends = [span.ended_ns for span in stages]
    assert all(end <= after.begun_ns + 1e6 for end, after in zip(ends, stages[1:], strict=False))
    assert compute.begun_ns <= queue.begun_ns
    assert decode.ended_ns <= compute.ended_ns
    for span in (*chunks, decode):
        told = span.attributes
        assert told["infinite_llm.step_seconds"] >= told["infinite_llm.attention_seconds"] > 0  # type: ignore[operator]


def _sums(chunks: list[CollectedSpan]) -> list[int]:
    sums = [0]
    for chunk in chunks:
        count = chunk.attributes["infinite_llm.tokens"]
        assert isinstance(count, int)
        sums.append(sums[-1] + count)
    return sums


def test_the_lender_tells_what_it_has_computed(trace: list[CollectedSpan]) -> None:
    hosted = [span for span in named(trace, "hosted attention") if span.member == LENDER]
    assert len(hosted) == len(named(trace, "hosted attention")) == 1  # aggregated; the own pool is mapped
    assert hosted[0].attributes["infinite_llm.instance"] == "instance-0"
    queries = sum(
        span.attributes["infinite_llm.remote_queries"]  # type: ignore[misc]
        for span in (*named(trace, "prefill chunk"), *named(trace, "decode"))
    )
    assert hosted[0].attributes["infinite_llm.queries"] == queries
    assert queries >= OUTPUT_TOKENS
    assert named(trace, "decode")[0].attributes["infinite_llm.kvdaemons"] == (LENDER,)
    compute = named(trace, "compute")[0]
    assert compute.begun_ns < hosted[0].begun_ns < hosted[0].ended_ns < compute.ended_ns


def test_reservations_are_part_of_it(trace: list[CollectedSpan]) -> None:
    calls = {(span.service, span.attributes.get("rpc.method")) for span in trace if "rpc.method" in span.attributes}
    assert calls == {("gmanager", "FindRoom"), ("kvdaemon", "Reserve")}


def test_grpc_clients_bring_their_trace_along(cluster: Cluster, collector: OtlpCollector) -> None:
    trace_id, metadata = "1" * 32, [("traceparent", f"00-{'1' * 32}-{CALLER}-01")]
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt_of(50, seed=82)), sampling={"max_tokens": 2, "ignore_eos": True}
    )
    with grpc.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        responses = list(stub.Generate(request, timeout=DEADLINE_S, metadata=metadata))
    assert responses[-1].HasField("finished")
    deadline = time.monotonic() + DEADLINE_S
    while not {("gateway", CALLER)} <= {(span.service, span.parent_id) for span in collector.trace(trace_id)}:
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def test_a_move_is_in_the_trace_of_its_request(cluster: Cluster, collector: OtlpCollector) -> None:
    """Ordered as a gManager orders it."""
    trace_id = "2" * 32
    body = {"prompt": prompt_of(200, seed=83), "max_tokens": 1100, "temperature": 0, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    recorder, mover = Recorder(), Mover(cluster)
    with cluster.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        ((request_id, address),) = mover.requests()
        order = MoveOrder("m", TOKEN, request_id, "kvdaemon-0", LENDER, mover.addresses[LENDER], num_blocks=2)
        answer = asyncio.run(_give(address, order, recorder))
        assert answer.accepted_blocks == 2, answer
        assert list(lines)[-2] == "data: [DONE]"
    deadline = time.monotonic() + DEADLINE_S
    while not {"move", "compute"} <= {span.name for span in collector.trace(trace_id)}:
        assert time.monotonic() < deadline, f"{collector.trace(trace_id)}\n{cluster.logs()}"
        time.sleep(0.1)
    (move,), (compute,) = ([s for s in collector.trace(trace_id) if s.name == name] for name in ("move", "compute"))
    assert (move.service, move.parent_id) == ("instance", compute.span_id)
    assert (move.attributes["infinite_llm.move.blocks"], move.attributes["infinite_llm.move.end"]) == (2, "DONE")
    (ordered,) = recorder.named("order move")
    assert parent_of(ordered) == TraceContext(int(trace_id, 16), int(compute.span_id, 16))


async def _give(address: str, order: MoveOrder, recorder: Recorder) -> MoveAnswer:
    clients = InstanceClients(tracer=recorder.tracer)
    try:
        return await clients.move_blocks(address, order, timeout_s=20.0)
    finally:
        await clients.close()


def test_a_collector_that_is_away_costs_spans_and_nothing_else(cluster: Cluster, collector: OtlpCollector) -> None:
    """Runs last."""
    collector.close()
    ids = [traced(cluster, prompt_of(100, seed=90 + number), "01", 5) for number in range(3)]
    assert len(set(ids)) == 3
    deadline = time.monotonic() + DEADLINE_S
    while not (said := _warnings(cluster)):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)
    ids.append(traced(cluster, prompt_of(100, seed=95), "01", 5))
    with OtlpCollector(collector.port) as back:
        while not back.trace(TRACE):
            assert time.monotonic() < deadline, cluster.logs()
            traced(cluster, prompt_of(100, seed=96), "01", 5)
            time.sleep(0.2)
    for member, lines in said.items():
        assert len(lines) == 1, f"{member}: {lines}"


def _warnings(cluster: Cluster) -> dict[str, list[str]]:
    """What each process has said of the export."""
    found: dict[str, list[str]] = {}
    for file in cluster.run_dir.rglob("*.log"):
        lines = [line for line in file.read_text(errors="replace").splitlines() if "spans" in line and "WARN" in line]
        if lines:
            found[file.stem] = lines
    return found
