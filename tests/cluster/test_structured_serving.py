"""Structured answers of a real model in a real cluster, also after its instance was killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from byte_tokenizer import EOS, write_byte_tokenizer
from cluster_process import Cluster
from random_llama import write_random_llama
from scraped import Scraped
from test_serving import SMALL_ENGINE

pytestmark = pytest.mark.cluster

PROMPT = [1 + n % 100 for n in range(200)]
LONG = {"type": "array", "items": {"enum": ["Köln", "Bonn"]}, "minItems": 40, "maxItems": 60}
ASKED = {"max_tokens": 1500, "temperature": 1.0, "structured_outputs": {"json": LONG}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two instances of a random Llama that speaks bytes."""
    model = tmp_path_factory.mktemp("models") / "bytes"
    write_random_llama(model)
    write_byte_tokenizer(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    arguments = ("--instances", "2", "--kvdaemons", "0", "--pool-mib", "8", "--dtype", "float32")
    with Cluster(model, tmp_path_factory.mktemp("run") / "c", *arguments, config=SMALL_ENGINE) as cluster:
        yield cluster


def check_long(text: str) -> None:
    cities = json.loads(text)
    assert 40 <= len(cities) <= 60
    assert set(cities) <= {"Köln", "Bonn"}


def test_choices_are_valid_and_share_the_prompt(cluster: Cluster) -> None:
    response = cluster.request(PROMPT, **ASKED, seed=5, n=3)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        check_long(choice["text"])
    assert len({choice["text"] for choice in choices}) == 3
    told = Scraped(cluster.http.get("/metrics").text)
    assert told.value("infinite_llm_cached_prompt_tokens_total") == 2 * (len(PROMPT) // 64 * 64)
    assert cluster.complete(PROMPT, **ASKED, seed=5).text == choices[0]["text"]


def test_a_killed_instance_changes_nothing(cluster: Cluster) -> None:
    expected = cluster.complete(PROMPT, **ASKED, seed=8).token_ids
    got: list[int] = []
    killed = False
    for chunk in cluster.stream(PROMPT, **ASKED, seed=8):
        got += chunk["choices"][0]["token_ids"]  # type: ignore[index]
        if not killed and len(got) > 20 and (running := cluster.requests()):
            cluster.signal(running[0].instance_id, signal.SIGKILL)
            killed = True
    assert killed
    assert got == expected
    check_long(bytes(got[:-1]).decode())


def test_a_tool_that_must_be_called_is_called(cluster: Cluster) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Bonn"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    body = {
        "messages": [{"role": "user", "content": "?"}],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 600,
        "temperature": 1.0,
        "n": 2,
    }
    answer = cluster.http.post("/v1/chat/completions", json=body).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "tool_calls", answer
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Köln", "Bonn")
        assert choice["message"]["content"] is None
