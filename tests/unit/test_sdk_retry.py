"""The SDK with gateways that break off, refuse or are full: what is tried again, where, and what the caller sees."""

import asyncio
import io
import threading

import pytest

from infinitellm import (
    AsyncClient,
    Client,
    Completion,
    Finished,
    Progress,
    PromptLogprobs,
    RetryPolicy,
    TokenLogprobs,
    Tokens,
    errors,
)
from infinitellm.batch import ProgressBar
from infinitellm.retry import Attempts, GenerationStream
from infinitellm.v1 import inference_pb2, inference_pb2_grpc
from services.core import errors as core_errors
from services.runtime.grpc_server import bind, make_server

DEADLINE_S = 20.0
ANSWER = [7, 8, 9, 10, 11]
QUICK = RetryPolicy(attempts=4, first_backoff_s=0.01, max_backoff_s=0.02)


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Each call takes the next step of ``script``: how many tokens it sends, and the reason of the error then."""

    def __init__(self, name, script):
        self.name = name
        self.script = list(script)
        self.calls = []

    async def Generate(self, request, context):
        self.calls.append(request)
        async for response in self._answer(f"{self.name}-{len(self.calls)}", request.received.ids):
            yield response

    async def Resume(self, request, context):
        self.calls.append(request)
        async for response in self._answer(request.request_id, request.received.ids):
            yield response

    async def _answer(self, request_id, received):
        count, reason = self.script.pop(0) if self.script else (len(ANSWER), None)
        assert list(received) == ANSWER[: len(received)]
        yield inference_pb2.GenerateResponse(request_id=request_id, progress={"computed_tokens": 1, "prompt_tokens": 1})
        for token in ANSWER[len(received) :][:count]:
            yield inference_pb2.GenerateResponse(request_id=request_id, tokens={"ids": [token], "text": f"{token} "})
        if len(received) + count >= len(ANSWER):
            yield inference_pb2.GenerateResponse(request_id=request_id, tokens={"text": "."})
        if reason == "ENDS":
            return
        if reason is not None:
            raise core_errors.all_errors()[reason](reason)
        finished = {"reason": 2, "prompt_tokens": 1, "completion_tokens": len(ANSWER)}
        yield inference_pb2.GenerateResponse(request_id=request_id, finished=finished)


@pytest.fixture
def serve():
    """Starts scripted gateways; answers them and their addresses."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(DEADLINE_S)

    async def start(gateway):
        server = make_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
        address = bind(server, "127.0.0.1:0")
        await server.start()
        servers.append(server)
        return address

    def start_all(*scripts):
        gateways = [Gateway(name, script) for name, script in zip("ab", scripts, strict=False)]
        return gateways, [call(start(gateway)) for gateway in gateways]

    start_all.call = call
    yield start_all
    for server in servers:
        call(server.stop(None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(DEADLINE_S)
    loop.close()


@pytest.fixture(params=["threads", "asyncio"])
def events_of(request, serve):
    """All events of one generation."""

    def of_client(addresses, **options):
        with Client(addresses, retry=QUICK) as client:
            return list(client.generate([1], max_tokens=9, **{"timeout_s": DEADLINE_S, **options}))

    def of_async_client(addresses, **options):
        async def go():
            async with AsyncClient(addresses, retry=QUICK) as client:
                return [e async for e in client.generate([1], max_tokens=9, **{"timeout_s": DEADLINE_S, **options})]

        return serve.call(go())

    return of_client if request.param == "threads" else of_async_client


def tokens_of(events):
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Tokens))


WHOLE_TEXT = "7 8 9 10 11 ."


@pytest.mark.parametrize("reason", ["UNAVAILABLE", "SHUTTING_DOWN", "ENDS"])
def test_a_stream_goes_on_at_the_next_gateway(serve, events_of, reason):
    (first, second), addresses = serve([(2, reason)], [(1, reason)])
    events = events_of(addresses)
    assert tokens_of(events) == ANSWER
    assert text_of(events) == WHOLE_TEXT
    assert [type(event) for event in events] == [Progress] + [Tokens] * 6 + [Finished]
    assert [type(call).__name__ for call in first.calls] == ["GenerateRequest", "ResumeRequest"]
    (resumed,) = second.calls
    assert (resumed.request_id, list(resumed.received.ids)) == ("a-1", ANSWER[:2])


def test_text_that_came_behind_the_last_token_comes_once(serve, events_of):
    _, addresses = serve([(9, "UNAVAILABLE")], [(0, "UNAVAILABLE")])
    events = events_of(addresses)
    assert (tokens_of(events), text_of(events)) == (ANSWER, WHOLE_TEXT)


@pytest.mark.parametrize("reason", ["REQUEST_NOT_FOUND", "JOURNAL_UNAVAILABLE", "RESYNC_REQUIRED"])
def test_without_a_journal_the_request_is_sent_again_behind_its_tokens(serve, events_of, reason):
    (first, second), addresses = serve([(3, "UNAVAILABLE")], [(0, reason), (1, "UNAVAILABLE")])
    events = events_of(addresses, temperature=0.5)
    assert (tokens_of(events), text_of(events)) == (ANSWER, WHOLE_TEXT)
    begun, again = first.calls[0], next(call for call in first.calls[1:] if call.DESCRIPTOR.name == "GenerateRequest")
    assert list(again.received.ids) == ANSWER[:3]
    assert begun.sampling.HasField("seed")
    assert again.sampling == begun.sampling
    assert events[-1].request_id == "a-2"
    assert second.calls[0].request_id == "a-1"


def test_of_a_prompt_that_is_told_again_only_what_is_new_comes():
    stream = GenerationStream(inference_pb2.GenerateRequest(), Attempts(QUICK, DEADLINE_S))

    def told(first, *logprobs):
        event = stream.take(PromptLogprobs("a-1", first, tuple(TokenLogprobs(one, (), ()) for one in logprobs)))
        return None if event is None else (event.first, [position.logprob for position in event.logprobs])

    assert told(1, -1.0, -2.0) == (1, [-1.0, -2.0])
    assert told(1, -1.0) is None
    assert told(2, -2.0, -3.0) == (3, [-3.0])
    assert told(4, -4.0) == (4, [-4.0])


def test_what_is_wrong_is_not_tried_again(serve, events_of):
    (gateway,), addresses = serve([(2, "INVALID_REQUEST")])
    with pytest.raises(errors.InvalidRequestError):
        events_of(addresses)
    assert len(gateway.calls) == 1


def test_a_full_queue_is_tried_again_up_to_a_number(serve, events_of):
    (gateway,), addresses = serve([(0, "QUEUE_FULL")] * 3)
    assert tokens_of(events_of(addresses)) == ANSWER
    gateway.calls.clear()
    gateway.script = [(0, "QUEUE_FULL")] * 4
    with pytest.raises(errors.QueueFullError):
        events_of(addresses)
    assert len(gateway.calls) == QUICK.attempts


def test_tokens_count_failures_anew(serve, events_of):
    (gateway,), addresses = serve([(0, "UNAVAILABLE")] * 3 + [(1, "UNAVAILABLE")] + [(0, "UNAVAILABLE")] * 2)
    assert tokens_of(events_of(addresses)) == ANSWER
    assert len(gateway.calls) == 7


def test_the_deadline_is_of_all_attempts_together(serve):
    (gateway,), addresses = serve([(0, "UNAVAILABLE")] * 1000)
    with (
        Client(addresses, retry=RetryPolicy(attempts=1000, first_backoff_s=0.05, max_backoff_s=0.05)) as client,
        pytest.raises((errors.DeadlineExceededError, errors.UnavailableError)),
    ):
        client.complete([1], max_tokens=1, timeout_s=0.5)
    assert 1 < len(gateway.calls) < 1000


def test_an_address_where_nobody_is(serve):
    (gateway,), addresses = serve([])
    with Client(["127.0.0.1:1", *addresses], retry=QUICK) as client:
        for _ in range(2):
            answer = client.complete([1], max_tokens=9)
            assert answer == Completion(answer.request_id, WHOLE_TEXT, tuple(ANSWER), (), "length", 1, 0)
    assert len(gateway.calls) == 2
    with pytest.raises(ValueError, match="at least one gateway"):
        Client([])


def test_a_batch_keeps_the_order_and_errors_stand_in_it(serve):
    (gateway,), addresses = serve([(9, None), (1, "CONTEXT_TOO_LONG")])

    def check(outcomes):
        assert outcomes[0].token_ids == tuple(ANSWER)
        assert type(outcomes[1]) is errors.ContextTooLongError
        assert outcomes[2].text == WHOLE_TEXT

    with Client(addresses) as client:
        check(client.complete_batch([[1], [2], [3]], max_tokens=9, concurrency=1))
    assert [list(call.token_ids.ids) for call in gateway.calls] == [[1], [2], [3]]

    async def go():
        async with AsyncClient(addresses) as client:
            return await client.complete_batch([[1], [2], [3]], max_tokens=9, concurrency=1)

    gateway.script = [(9, None), (1, "CONTEXT_TOO_LONG")]
    check(serve.call(go()))


def test_the_progress_bar():
    stream = io.StringIO()
    bar = ProgressBar(2, True, stream)
    bar.advance()
    bar.advance()
    lines = stream.getvalue().split("\r")[1:]
    assert [line.split("]")[0].count("#") for line in lines] == [0, 15, 30]
    assert lines[1].startswith("[###############...............] 1/2 ")
    assert lines[2].endswith("/s\n")
    silent = io.StringIO()
    ProgressBar(1, None, silent).advance()  # no terminal
    assert silent.getvalue() == ""
