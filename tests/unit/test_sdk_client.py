"""The SDK's clients against a real gRPC server with the services' own error interceptor."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import aclosing, closing

import grpc
import pytest
from signals import send_signal

from infinitellm import (
    AsyncClient,
    BlockPlacement,
    Client,
    ClusterStatus,
    Finished,
    GManagerStatus,
    InstanceStatus,
    KvDaemonStatus,
    PeerTransport,
    PoolUse,
    Progress,
    RequestStatus,
    RetryPolicy,
    TokenLogprobs,
    Tokens,
)
from infinitellm import errors as sdk_errors
from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.core import errors as core_errors
from services.runtime.grpc_server import bind, make_server

DEADLINE_S = 20.0
ONCE = RetryPolicy(attempts=1)


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers what its prompt asks for: "fail REASON", "status CODE", "endless", anything else is echoed."""

    def __init__(self):
        self.requests = []
        self.ended = threading.Event()

    async def Generate(self, request, context):
        self.requests.append(request)
        verb, _, what = request.text.partition(" ")
        if verb == "fail":
            raise core_errors.all_errors()[what](f"{what} it is")
        if verb == "status":
            await context.abort(grpc.StatusCode[what], "said by gRPC itself")
        progress = inference_pb2.PrefillProgress(computed_tokens=3, prompt_tokens=5)
        yield inference_pb2.GenerateResponse(request_id="r-1", progress=progress)
        if verb == "endless":
            try:
                while True:
                    yield inference_pb2.GenerateResponse(request_id="r-1", tokens={"ids": [1]})
                    await asyncio.sleep(0.01)
            finally:
                self.ended.set()
        logprob = inference_pb2.TokenLogprobs(logprob=-0.5, top_ids=[7, 8], top_logprobs=[-0.5, -1.0])
        tokens = inference_pb2.GeneratedTokens(ids=[7], text=request.text, logprobs=[logprob])
        yield inference_pb2.GenerateResponse(request_id="r-1", tokens=tokens)
        finished = inference_pb2.GenerationFinished(
            reason=inference_pb2.FINISH_REASON_LENGTH, prompt_tokens=5, completion_tokens=1, cached_tokens=2
        )
        yield inference_pb2.GenerateResponse(request_id="r-1", finished=finished)


class Cluster(cluster_pb2_grpc.ClusterServiceServicer):
    async def GetClusterStatus(self, request, context):
        use = cluster_pb2.PoolUse(total=10, free=4, cached=1, workspace=2, reserved=1, in_use=2)
        return cluster_pb2.GetClusterStatusResponse(
            instances=[
                cluster_pb2.InstanceStatus(
                    instance_id="i-0",
                    address="127.0.0.1:1",
                    local_kvdaemon_id="kv-0",
                    running_requests=1,
                    waiting_requests=2,
                    heartbeat_age_s=0.5,
                    transports=[cluster_pb2.PeerTransport(kvdaemon_id="kv-1", transport="tcp")],
                )
            ],
            kvdaemons=[
                cluster_pb2.KvDaemonStatus(
                    kvdaemon_id="kv-0",
                    address="127.0.0.1:2",
                    pool_bytes=4096,
                    block_bytes=256,
                    use=use,
                    heartbeat_age_s=0.25,
                )
            ],
            requests=[
                cluster_pb2.RequestStatus(
                    request_id="r-1",
                    instance_id="i-0",
                    placement=[cluster_pb2.BlockPlacement(kvdaemon_id="kv-0", num_blocks=2, local=True)],
                )
            ],
            models=["needle"],
            gmanagers=[cluster_pb2.GManagerStatus(gmanager_id="g-1", address="127.0.0.1:3", leads=True)],
        )


class Gateway:
    """The two servicers on an event loop in a thread; asyncio clients run there too, since gRPC wants one loop."""

    def __init__(self):
        self.inference = Inference()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.address = self.call(self._start())

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE_S)

    async def _start(self):
        self.server = make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, self.server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(Cluster(), self.server)
        address = bind(self.server, "127.0.0.1:0")
        await self.server.start()
        return address

    def stop(self):
        self.call(self.server.stop(None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE_S)
        self.loop.close()


@pytest.fixture
def gateway():
    gateway = Gateway()
    yield gateway
    gateway.stop()


ECHOED = [
    Progress("r-1", 3, 5),
    Tokens("r-1", (7,), "hello", (TokenLogprobs(-0.5, (7, 8), (-0.5, -1.0)),)),
    Finished("r-1", "length", 5, 1, 2),
]
STATUS = ClusterStatus(
    instances=(InstanceStatus("i-0", "127.0.0.1:1", "kv-0", 1, 2, 0.5, (PeerTransport("kv-1", "tcp"),)),),
    kvdaemons=(KvDaemonStatus("kv-0", "127.0.0.1:2", 4096, 256, PoolUse(10, 4, 1, 2, 1, 2), 0.25),),
    requests=(RequestStatus("r-1", "i-0", (BlockPlacement("kv-0", 2, True),)),),
    models=("needle",),
    gmanagers=(GManagerStatus("g-1", "127.0.0.1:3", True),),
)


def test_the_error_trees_agree():
    """Same names, reasons and parents; DeadlineExceededError is the client's own."""

    def shape(tree):
        return {(reason, cls.__name__, cls.__base__.__name__) for reason, cls in tree.items()}

    own = ("DEADLINE_EXCEEDED", "DeadlineExceededError", "InfiniteLLMError")
    assert shape(sdk_errors.all_errors()) == shape(core_errors.all_errors()) | {own}


def test_generate_and_status(gateway):
    with Client(gateway.address) as client:
        assert list(client.generate("hello", max_tokens=3, timeout_s=DEADLINE_S)) == ECHOED
        assert client.cluster_status() == STATUS


def test_async_generate_and_status(gateway):
    async def go():
        async with AsyncClient(gateway.address) as client:
            assert [e async for e in client.generate("hello", max_tokens=3, timeout_s=DEADLINE_S)] == ECHOED
            assert await client.cluster_status() == STATUS

    gateway.call(go())


def test_the_request_carries_every_argument(gateway):
    with Client(gateway.address) as client:
        list(
            client.generate(
                [1, 2, 2**32 - 1],
                max_tokens=9,
                temperature=0.5,
                seed=0,
                ignore_eos=True,
                logprobs=4,
                progress=True,
                model="m",
                top_k=3,
                top_p=0.5,
                logit_bias={7: -1.5},
                stop_token_ids=[8],
            )
        )
        list(client.generate([], max_tokens=1))
    full, empty = gateway.inference.requests
    assert list(full.token_ids.ids) == [1, 2, 2**32 - 1]
    sampling = full.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.ignore_eos, sampling.logprobs) == (9, 0.5, True, 4)
    assert (sampling.HasField("seed"), sampling.seed, full.progress, full.model) == (True, 0, True, "m")
    assert (sampling.top_k, sampling.top_p, dict(sampling.logit_bias)) == (3, 0.5, {7: -1.5})
    assert (list(sampling.stop_token_ids), sampling.HasField("repetition_penalty")) == ([8], False)
    assert empty.WhichOneof("prompt") == "token_ids"
    assert not empty.sampling.HasField("seed")


@pytest.mark.parametrize("bad", [{"prompt": [-1]}, {"prompt": ["x"]}, {"max_tokens": -1}, {"seed": 2**64}])
def test_what_cannot_be_written_is_an_invalid_request(gateway, bad):
    with (
        Client(gateway.address) as client,
        pytest.raises(sdk_errors.InvalidRequestError, match="cannot be written"),
    ):
        client.generate(**({"prompt": "hello", "max_tokens": 1} | bad))
    assert gateway.inference.requests == []


def test_every_reason_becomes_its_class(gateway):
    with Client(gateway.address, retry=ONCE) as client:
        for reason in core_errors.all_errors():
            with pytest.raises(sdk_errors.InfiniteLLMError) as caught:
                list(client.generate(f"fail {reason}", max_tokens=1, timeout_s=DEADLINE_S))
            assert type(caught.value) is sdk_errors.all_errors()[reason]
            assert str(caught.value) == f"{reason} it is"


def test_async_reason_becomes_its_class(gateway):
    async def go():
        async with AsyncClient(gateway.address) as client:
            with pytest.raises(sdk_errors.ContextTooLongError, match="CONTEXT_TOO_LONG it is"):
                _ = [e async for e in client.generate("fail CONTEXT_TOO_LONG", max_tokens=1)]

    gateway.call(go())


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("UNAVAILABLE", sdk_errors.UnavailableError),
        ("INVALID_ARGUMENT", sdk_errors.InvalidRequestError),
        ("UNIMPLEMENTED", sdk_errors.InfiniteLLMError),
    ],
)
def test_a_bare_status_becomes_a_class_that_fits(gateway, status, expected):
    with Client(gateway.address, retry=ONCE) as client, pytest.raises(sdk_errors.InfiniteLLMError) as caught:
        list(client.generate(f"status {status}", max_tokens=1, timeout_s=DEADLINE_S))
    assert type(caught.value) is expected


def test_nobody_listening():
    with Client("127.0.0.1:1") as client, pytest.raises(sdk_errors.UnavailableError):
        client.cluster_status(timeout_s=DEADLINE_S)


def test_the_deadline_ends_a_call(gateway):
    with Client(gateway.address) as client, pytest.raises(sdk_errors.DeadlineExceededError):
        list(client.generate("endless", max_tokens=1, timeout_s=0.3))
    assert gateway.inference.ended.wait(DEADLINE_S)


def test_closing_the_generator_cancels_the_request(gateway):
    with Client(gateway.address) as client:
        with closing(client.generate("endless", max_tokens=1, timeout_s=DEADLINE_S)) as events:
            assert next(events) == Progress("r-1", 3, 5)
        assert gateway.inference.ended.wait(DEADLINE_S)
        assert client.cluster_status() == STATUS


def test_closing_the_async_generator_cancels_the_request(gateway):
    async def go():
        async with AsyncClient(gateway.address) as client:
            async with aclosing(client.generate("endless", max_tokens=1, timeout_s=DEADLINE_S)) as events:
                assert await anext(events) == Progress("r-1", 3, 5)
            assert await asyncio.to_thread(gateway.inference.ended.wait, DEADLINE_S)

    gateway.call(go())


def test_cancelling_the_task_cancels_the_request(gateway):
    async def go():
        async with AsyncClient(gateway.address) as client:

            async def consume():
                async for _ in client.generate("endless", max_tokens=1, timeout_s=DEADLINE_S):
                    started.set()

            started = asyncio.Event()
            task = asyncio.create_task(consume())
            await asyncio.wait_for(started.wait(), DEADLINE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gateway.inference.ended.wait, DEADLINE_S)

    gateway.call(go())


SILENT_GATEWAY = textwrap.dedent(
    """
    import asyncio
    from infinitellm.v1 import inference_pb2, inference_pb2_grpc
    from services.runtime.grpc_server import bind, make_server

    class Inference(inference_pb2_grpc.InferenceServiceServicer):
        async def Generate(self, request, context):
            yield inference_pb2.GenerateResponse(request_id="r-1", progress={"computed_tokens": 1})
            await asyncio.sleep(60)

    async def main():
        server = make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), server)
        print(bind(server, "127.0.0.1:0"), flush=True)
        await server.start()
        await server.wait_for_termination(60)

    asyncio.run(main())
    """
)


@pytest.mark.parametrize("kind", [signal.SIGSTOP, signal.SIGKILL])
def test_a_dead_or_stopped_gateway_is_noticed(kind):
    process = subprocess.Popen([sys.executable, "-c", SILENT_GATEWAY], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        with Client(address, retry=ONCE) as client:
            events = client.generate("hello", max_tokens=1, timeout_s=60.0)
            assert next(events) == Progress("r-1", 1, 0)
            send_signal(process.pid, kind)
            start = time.monotonic()
            with pytest.raises(sdk_errors.UnavailableError):
                next(events)
            assert time.monotonic() - start < 40  # long before the call's deadline
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()
