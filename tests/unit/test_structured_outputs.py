"""Answers under a schema, a regular expression or a grammar are valid, whatever the model would like to say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import EOS, write_byte_tokenizer
from engine_rig import EngineRig
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from random_llama import write_random_llama
from scraped import scraped

from services.core.errors import InvalidRequestError
from services.core.sequence import Request, SamplingParams, Sequence
from services.core.structure import Structure, StructureKind
from services.instance.outputs import FailOutput
from services.instance.sampler import Sampler
from services.runtime.grammars import Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", "Köln"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 42},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["city", "count", "tags"],
    "additionalProperties": False,
}
REGEX = r"([0-9]{1,3}\.){3}[0-9]{1,3}"
LARK = 'start: "+" start | "(" start ")" | /[a-c]/'


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"city", "count", "tags"}
        and value["city"] in ("Zürich", "Köln")
        and 3 <= value["count"] <= 42
        and len(value["tags"]) <= 2
        and all(len(tag) <= 3 for tag in value["tags"])
    )


def is_term(text: str) -> bool:
    while text[:1] in ("+", "("):
        if text[0] == "(" and text[-1] != ")":
            return False
        text = text[1:] if text[0] == "+" else text[1:-1]
    return text in ("a", "b", "c")


CASES = {
    "json_schema": (Structure("json_schema", json.dumps(SCHEMA)), is_valid),
    "regex": (Structure("regex", REGEX), lambda text: re.fullmatch(REGEX, text) is not None),
    "grammar": (Structure("grammar", LARK), is_term),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 512 rows of logits, and a tokenizer for the first 257: every byte, and the end."""
    path = tmp_path_factory.mktemp("structured")
    write_random_llama(path)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    return Grammars(checkpoint, 512)


@pytest.fixture(scope="module")
def rig(checkpoint: Path, grammars: Grammars) -> Iterator[EngineRig]:
    with EngineRig(checkpoint, local_blocks=128, block_tokens=16, grammars=grammars) as rig:
        yield rig


def answer(rig: EngineRig, name: str) -> str:
    *tokens, last = rig.tokens(name)
    assert rig.finish(name).reason == "stop"
    assert last == EOS
    return bytes(tokens).decode()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_model_with_random_weights_answers_validly(rig: EngineRig, kind: str, temperature: float) -> None:
    structure, valid = CASES[kind]
    names = [f"{kind}-{temperature}-{seed}" for seed in range(4)]
    for seed, name in enumerate(names):
        rig.submit(
            name,
            range(1, 9),
            400,
            temperature=temperature,
            seed=seed,
            stop_token_ids=frozenset({EOS}),
            structure=structure,
        )
    rig.wait(*names)
    done = [name for name in names if rig.finish(name).reason == "stop"]
    for name in done:
        assert valid(answer(rig, name)), answer(rig, name)
    if temperature:
        assert done, "no answer came to its end: this shows nothing"


def test_after_preemption_and_elsewhere_the_same_answer_goes_on(checkpoint: Path, grammars: Grammars) -> None:
    """What is drawn is a matter of prompt, seed and structure: not of room, nor of where it was begun."""
    structure = Structure("json_schema", json.dumps({"type": "array", "items": {"enum": [1, 2]}, "minItems": 60}))
    options = {"temperature": 1.0, "stop_token_ids": frozenset({EOS}), "structure": structure}
    names = [f"r{seed}" for seed in range(3)]
    with EngineRig(checkpoint, local_blocks=64, block_tokens=16, grammars=grammars) as roomy:
        for seed, name in enumerate(names):
            roomy.submit(name, range(1, 40), 200, seed=seed, **options)
        roomy.wait(*names)
        expected = {name: roomy.tokens(name) for name in names}
    with EngineRig(checkpoint, local_blocks=26, workspace=6, block_tokens=16, grammars=grammars) as narrow:
        for seed, name in enumerate(names):
            narrow.submit(name, range(1, 40), 200, seed=seed, **options)
        narrow.wait(*names)
        assert {name: narrow.tokens(name) for name in names} == expected
        assert scraped(narrow.registry).by("reason", "infinite_llm_preemptions_total")["memory"] > 0
    # Begun elsewhere: a new sampler is told the tokens so far.
    tokens = expected["r0"]
    params = SamplingParams(1.0, 0, 200, frozenset({EOS}), structure=structure)
    sampler = Sampler(512, grammars)
    begun = Sequence(Request("r0", (*range(1, 40), *tokens[:50]), 39, params, 0.0, 1))
    state = grammars.start(structure)
    state.take(tokens[:50])
    (drawn,) = sampler.draw(torch.zeros(1, 512), [begun])
    assert not isinstance(drawn, InvalidRequestError)
    assert state.allowed()[drawn.token_id]


def test_the_end_comes_exactly_where_the_answer_is_complete(grammars: Grammars) -> None:
    state = grammars.start(Structure("regex", "ab?"))
    assert np.flatnonzero(state.allowed()).tolist() == list(b"a")
    assert not state.complete
    state.take(list(b"a"))
    assert np.flatnonzero(state.allowed()).tolist() == list(b"b")
    assert state.complete
    state.take(list(b"ab"))
    assert not state.allowed().any()
    assert state.complete
    # The end is drawn there even where more tokens were asked for.
    params = SamplingParams(0.0, 0, 9, frozenset({EOS, ord("c")}), structure=Structure("regex", "a"))
    sequence = Sequence(Request("r", (1, *b"a"), 1, params, 0.0, 1))
    (drawn,) = Sampler(512, grammars).draw(torch.zeros(1, 512), [sequence])
    assert not isinstance(drawn, InvalidRequestError)
    assert drawn.token_id in (EOS, ord("c"))


def test_a_structure_that_no_token_can_follow_ends_its_request_alone(tmp_path: Path, checkpoint: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    missing = next(token for token, number in tokenizer["model"]["vocab"].items() if number == ord("z"))
    tokenizer["model"]["vocab"]["zz"] = tokenizer["model"]["vocab"].pop(missing)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with EngineRig(checkpoint, grammars=Grammars(tmp_path, 512)) as rig:
        rig.submit("fails", [1, 2], 9, stop_token_ids=frozenset({EOS}), structure=Structure("regex", "abz", "x.regex"))
        rig.submit("goes on", [1, 2], 9)
        rig.wait("fails", "goes on")
        (failure,) = [output for output in rig.outputs if isinstance(output, FailOutput)]
        assert failure.request_id == "fails"
        assert str(failure.error).startswith("x.regex: no token")
        assert len(rig.tokens("goes on")) == 9
        rig.check_nothing_held()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", "{", "not a valid json_schema"),
        ("json_schema", "[]", "a schema is a JSON object"),
        ("json_schema", '{"type": "obj"}', "obj"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "http://elsewhere/schema"}', "not present"),
        ("json_schema", '{"not":' * 2000 + "{}" + "}" * 2000, "recursion"),
        ("regex", "[0-9", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "not a valid regex"),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", "start: start", "not a valid grammar"),
        ("grammar", "§§§", "not a valid grammar"),
        ("poem", "", "is none of json_schema, regex, grammar"),
        ("regex", "a" * (2**15 + 1), "at most 32768 characters"),
    ],
)
def test_what_is_wrong_is_named(grammars: Grammars, kind: StructureKind, text: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        grammars.start(Structure(kind, text, "the.field"))
    assert str(caught.value).startswith("the.field: ")


def test_rules_may_refer_to_one_another_however_deeply(grammars: Grammars) -> None:
    chain = "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(2500)) + '\na2500: "x"'
    references = {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}, "type": "array"} for n in range(500)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**references, "a500": {}}}
    assert grammars.start(Structure("grammar", chain)).allowed()[ord("x")]
    assert grammars.start(Structure("json_schema", json.dumps(schema))).allowed()[ord("[")]


def test_without_a_suitable_tokenizer(tmp_path: Path) -> None:
    structure = Structure("regex", "a", "the.field")
    with pytest.raises(InvalidRequestError, match=r"the\.field: this model has no tokenizer"):
        Grammars(tmp_path, 512).start(structure)
    write_byte_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}))
    with pytest.raises(InvalidRequestError, match=r"the\.field: .*no special tokens"):
        Grammars(tmp_path, 512).start(structure)


@cases(300)
@given(
    st.sampled_from(["json_schema", "regex", "grammar"]),
    st.text(max_size=40) | st.from_regex(r"[a-c(\[{*+?|\\]{0,20}"),
)
def test_any_text_is_a_structure_or_refused(grammars: Grammars, kind: StructureKind, text: str) -> None:
    try:
        state = grammars.start(Structure(kind, text))
    except InvalidRequestError:
        return
    assert state.complete or state.allowed().any()
