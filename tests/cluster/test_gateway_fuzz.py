"""Any message and any body gets an answer or a refusal from a real gateway: no internal error, and nothing hangs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import schemathesis
from etcd_process import EtcdProcess
from fuzzing import cases
from gateway_rig import Gateway, gateway, instance_process, service, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from odd_values import VALUES

from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_types import CompletionRequest, SamplingRequest

pytestmark = pytest.mark.cluster
DEADLINE_S = 30.0
CLEAN = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}

UINT32 = st.integers(0, 20) | st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
FLOAT = st.floats(0, 2, width=32) | st.floats(width=32) | st.just(math.nan)
TEXT = st.text(max_size=12)
STRUCTURE = TEXT | st.sampled_from(["a+", '{"type": "object"}', "start: x", 'root ::= "a"', "(", "[" * 300, "{" * 300])


def some_of(fields: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[dict[str, object]]:
    """Any values for up to three fields, which leaves something to be answered."""
    names = st.lists(st.sampled_from([*fields]), max_size=3, unique=True)
    odd = names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen}))
    return odd.map(lambda values: {"max_tokens": 5, **values})


SAMPLING = st.builds(
    lambda fields, structure: inference_pb2.SamplingParams(**fields, **structure),
    some_of(
        {
            "max_tokens": st.integers(0, 30) | UINT32,
            "temperature": FLOAT,
            "seed": UINT64,
            "ignore_eos": st.booleans(),
            "logprobs": UINT32,
            "prompt_logprobs": st.integers(0, 20) | UINT32,
            "top_k": UINT32,
            "top_p": FLOAT,
            "min_p": FLOAT,
            "repetition_penalty": FLOAT,
            "presence_penalty": FLOAT,
            "frequency_penalty": FLOAT,
            "logit_bias": st.dictionaries(UINT32, FLOAT, max_size=3),
            "min_tokens": UINT32,
            "stop_token_ids": st.lists(UINT32, max_size=3),
            "stop": st.lists(TEXT, max_size=20),
            "include_stop_str_in_output": st.booleans(),
        }
    ),
    st.just({}) | st.dictionaries(st.sampled_from(["json_schema", "regex", "grammar"]), STRUCTURE, max_size=1),
)
REQUESTS = st.builds(
    lambda fields, prompt: inference_pb2.GenerateRequest(**fields, **prompt),
    st.fixed_dictionaries(
        {"sampling": SAMPLING, "model": st.just("tiny") | st.just("") | TEXT}, optional={"progress": st.booleans()}
    ),
    st.one_of(
        st.just({"text": "a"}),
        st.just({}),
        TEXT.map(lambda text: {"text": text}),
        st.lists(UINT32, max_size=5).map(lambda ids: {"token_ids": inference_pb2.TokenIds(ids=ids)}),
    ),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with an instance that answers at once."""
    root: Path = tmp_path_factory.mktemp("fuzz")
    etcd = EtcdProcess(root)
    etcd.start()
    try:
        with (
            service("gmanager", root, listen="127.0.0.1:0", etcd=[etcd.endpoint]),
            gateway(root, etcd.endpoint, write_checkpoint(root / "tiny")) as running,
            instance_process("instance-0", etcd.endpoint, 0.0),
        ):
            deadline = time.monotonic() + DEADLINE_S
            while httpx.get(f"{running.http}/health").status_code != 200:
                assert time.monotonic() < deadline, running.log.read_text()
                time.sleep(0.1)
            yield running
    finally:
        etcd.kill()


def test_any_generate_request(served: Gateway) -> None:
    answered = 0
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        @cases(250)
        @given(REQUESTS)
        def requests(request: inference_pb2.GenerateRequest) -> None:
            nonlocal answered
            call = stub.Generate(request, timeout=DEADLINE_S)
            try:
                for number, response in enumerate(call):
                    assert response.WhichOneof("event")
                    if number > 50:  # thousands may be asked for
                        break
                answered += 1
            except grpc.RpcError:
                assert call.code() in CLEAN, f"{call.code()}: {call.details()}"
                assert call.details()
            finally:
                call.cancel()

        requests()
        assert answered > 10, "hardly anything was answered: this shows nothing"
        status = cluster_pb2_grpc.ClusterServiceStub(channel).GetClusterStatus(
            cluster_pb2.GetClusterStatusRequest(), timeout=DEADLINE_S
        )
        assert status.models == ["tiny"]


def test_what_the_document_allows(served: Gateway) -> None:
    """Schemathesis makes requests of /openapi.json, as it allows them and as it does not."""
    schema = schemathesis.openapi.from_url(f"{served.http}/openapi.json")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [*schemathesis.GenerationMode] if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @cases(40)
            @given(operation.as_strategy(generation_mode=mode))
            def requests(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=[schemathesis.checks.not_a_server_error], timeout=DEADLINE_S)

            requests()
            tried.add(operation.path)
    assert tried == {*schema.raw_schema["paths"]}


def odd_bodies(kind: type[SamplingRequest]) -> st.SearchStrategy[dict[str, object]]:
    prompt = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "a"}]}
    odd = st.dictionaries(st.sampled_from([*kind.model_fields, *kind.neutral]), VALUES, max_size=2)
    return odd.map(lambda fields: {**prompt, "max_tokens": 3, **fields})


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)]
)
def test_any_body(served: Gateway, path: str, kind: type[SamplingRequest]) -> None:
    with httpx.Client(base_url=served.http, timeout=DEADLINE_S) as client:

        @cases(150)
        @given(odd_bodies(kind))
        def bodies(body: dict[str, object]) -> None:
            response = client.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"))
            assert response.status_code in (200, 400, 404, 429), response.text

        bodies()
        everything = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "tokens": [1], "model": "tiny"}

        @cases(60)
        @given(st.sampled_from(["/tokenize", "/detokenize"]), st.dictionaries(st.sampled_from([*everything]), VALUES))
        def other_bodies(other: str, body: dict[str, object]) -> None:
            response = client.post(other, content=json.dumps(body).encode("utf-8", "surrogatepass"))
            assert response.status_code in (200, 400, 404), response.text

        other_bodies()
        assert client.get("/health").status_code == 200
