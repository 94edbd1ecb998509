"""Whatever is in a body, it is understood or refused by name: nothing else leaves the parsers."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from odd_values import VALUES

from services.core.errors import InvalidRequestError
from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_errors import ApiError, api_error
from services.gateway.openai_types import CompletionRequest, SamplingRequest, parse_body, parse_request
from services.gateway.tokenize_api import DetokenizeRequest, TokenizeRequest

VOCAB = 1000
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), VALUES, max_size=4), max_size=3
)
SOUND = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "max_tokens": st.integers(0, 50),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 2 * VOCAB).map(str), st.floats(-100, 100), max_size=3),
        "stream": st.booleans(),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "n": st.integers(1, 3),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 20) | st.booleans(),
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        "structured_outputs": st.sampled_from([{"regex": "a"}, {"json": {}}, {"choice": ["a"]}, {"grammar": "x"}]),
    },
)


def fields_of(kind: type[SamplingRequest]) -> st.SearchStrategy[dict[str, object]]:
    """A sound body in which some fields are anything."""
    names = [*kind.model_fields, *kind.neutral, "no_such_field"]
    prompt = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "a"}]}
    odd = st.dictionaries(st.sampled_from(names), VALUES | MESSAGES, max_size=3)
    return st.builds(lambda sound, anything: {**prompt, **sound, **anything}, SOUND, odd)


def check(kind: type[SamplingRequest], body: bytes) -> bool:
    """Whether it was understood. What is understood must be of use further on."""
    refusal: ApiError | InvalidRequestError
    try:
        asked = parse_request(kind, body)
        if isinstance(asked, CompletionRequest):
            assert asked.the_prompt()
            sampling = asked.sampling(16, asked.logprobs)
        else:
            assert isinstance(asked, ChatRequest)
            assert all(isinstance(message.for_template()["role"], str) for message in asked.messages)
            sampling = asked.sampling(16, asked.shown_logprobs)
        sampling.shaping.check(VOCAB, sampling.max_tokens)
    except (ApiError, InvalidRequestError) as error:
        refusal = error
    else:
        assert sampling.max_tokens >= (0 if kind is CompletionRequest and asked.echo else 1)
        assert sampling.prompt_logprobs == (sampling.logprobs if kind is CompletionRequest and asked.echo else 0)
        assert math.isfinite(sampling.temperature)
        assert sampling.seed is None or 0 <= sampling.seed < 2**64
        assert all(sampling.stop)
        return True
    answer = refusal if isinstance(refusal, ApiError) else api_error(refusal)
    assert answer.status == 400
    assert json.loads(answer.body())["error"]["message"]
    return False


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_bodies_with_odd_fields(kind: type[SamplingRequest]) -> None:
    understood = 0

    @cases(400)
    @given(fields_of(kind))
    def bodies(body: dict[str, object]) -> None:
        nonlocal understood
        understood += check(kind, json.dumps(body).encode("utf-8", "surrogatepass"))

    bodies()
    assert understood > 20, "hardly anything was understood: this shows nothing"


@cases(300)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_bodies_that_are_anything(body: bytes) -> None:
    for kind in (CompletionRequest, ChatRequest):
        assert not check(kind, body)
    for other in (TokenizeRequest, DetokenizeRequest):
        with suppress(ApiError):
            assert isinstance(parse_body(other, body), other)
