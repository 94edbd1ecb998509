"""Needle tasks and the plain-Python oracle; no model."""

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

from services.launcher.needle.task import (
    DISTRACTORS,
    MATCH_TOKENS,
    MIN_CONTEXT_TOKENS,
    NEEDLE_TOKENS,
    QUESTION_TOKENS,
    make_task,
    oracle,
)
from services.launcher.needle.vocabulary import MINI_VOCABULARY, STD_VOCABULARY

VOCABULARIES = pytest.mark.parametrize("vocabulary", [STD_VOCABULARY, MINI_VOCABULARY], ids=["std", "mini"])


def naive_oracle(vocabulary, token_ids):
    """The oracle's rule, written down without any search."""
    tokens = [vocabulary.bos] * (MATCH_TOKENS - 1) + list(token_ids)
    answer = []
    while len(answer) < 64 and (not answer or answer[-1] != vocabulary.eos):
        last = tokens[-MATCH_TOKENS:]
        found = {tokens[i] for i in range(MATCH_TOKENS, len(tokens)) if tokens[i - MATCH_TOKENS : i] == last}
        found.discard(vocabulary.bos)
        if len(found) > 1:
            return None
        answer.append(found.pop() if found else vocabulary.eos)
        tokens.append(answer[-1])
    return answer


@VOCABULARIES
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("context_tokens", [MIN_CONTEXT_TOKENS, MIN_CONTEXT_TOKENS + 13, 3000])
def test_the_expected_answer_is_the_oracles(vocabulary, context_tokens, depth, missing):
    for seed in range(5):
        task = make_task(vocabulary, context_tokens, depth, seed, missing=missing)
        assert len(task.prompt_token_ids) == context_tokens
        assert oracle(vocabulary, task.prompt_token_ids) == list(task.expected_token_ids)
        assert len(task.expected_token_ids) == (1 if missing else 9)
        assert task.expected_token_ids[-1] == vocabulary.eos


@VOCABULARIES
def test_the_needle_stands_at_its_depth(vocabulary):
    context_tokens = 2000
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = make_task(vocabulary, context_tokens, depth, seed=3)
        question = task.prompt_token_ids[-QUESTION_TOKENS:]
        prompt = "".join(map(chr, task.prompt_token_ids))
        place = prompt.index("".join(map(chr, question)))
        assert place == 1 + round(depth * (context_tokens - 1 - QUESTION_TOKENS - NEEDLE_TOKENS))


def test_distractors_are_near_misses_with_other_values():
    task = make_task(STD_VOCABULARY, 1000, 0.5, seed=11)
    needles = [text.split("<|val|>") for text in task.prompt_text.split("<|key|>")[1:-1]]
    answers = {key: rest[:8] for key, rest in needles}
    assert len(answers) == len(needles) == DISTRACTORS + 1
    assert answers.pop(task.key_text) == task.expected_text
    distances = sorted(sum(a != b for a, b in zip(key, task.key_text, strict=True)) for key in answers)
    assert distances[:4] == [1, 1, 1, 1]
    assert all(value[0] != task.expected_text[0] for value in answers.values())


def test_a_missing_key_is_a_near_miss_of_the_needle():
    task = make_task(STD_VOCABULARY, 1000, 0.0, seed=11, missing=True)
    planted = task.prompt_text.removeprefix("<|key|>")[:6]
    assert sum(a != b for a, b in zip(planted, task.key_text, strict=True)) == 1
    assert f"<|key|>{task.key_text}" not in task.prompt_text.removesuffix(f"<|key|>{task.key_text}<|val|>")
    assert task.expected_text == ""


def test_tasks_are_a_function_of_their_arguments():
    assert make_task(STD_VOCABULARY, 900, 0.5, seed=1) == make_task(STD_VOCABULARY, 900, 0.5, seed=1)
    assert make_task(STD_VOCABULARY, 900, 0.5, seed=1) != make_task(STD_VOCABULARY, 900, 0.5, seed=2)


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match=f"at least {MIN_CONTEXT_TOKENS} context tokens, got 20"):
        make_task(STD_VOCABULARY, 20, 0.5, seed=0)
    with pytest.raises(ValueError, match="depth must lie in"):
        make_task(STD_VOCABULARY, 1000, 1.5, seed=0)


@cases(200)
@given(st.lists(st.sampled_from([0, 1, STD_VOCABULARY.bos, STD_VOCABULARY.eos]), min_size=1, max_size=60), st.data())
def test_oracle_against_the_naive_rule(tokens, data):
    repeat = data.draw(st.integers(0, len(tokens)))
    prompt = [STD_VOCABULARY.bos, *tokens, *tokens[:repeat]]  # matches are common
    expected = naive_oracle(STD_VOCABULARY, prompt)
    if expected is None:
        with pytest.raises(ValueError, match="ambiguous"):
            oracle(STD_VOCABULARY, prompt)
    else:
        assert oracle(STD_VOCABULARY, prompt) == expected


def test_oracle_ends_in_a_text_that_repeats_for_ever():
    assert oracle(STD_VOCABULARY, [STD_VOCABULARY.bos] + [97, 98] * 20, max_tokens=5) == [97, 98, 97, 98, 97]


def test_a_million_tokens():
    task = make_task(STD_VOCABULARY, 1_000_000, 0.3, seed=5)
    assert oracle(STD_VOCABULARY, task.prompt_token_ids) == list(task.expected_token_ids)
