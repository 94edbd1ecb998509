"""Needle-in-a-haystack tasks and their right answers, in plain Python.

A needle is ``<|key|> k1..k6 <|val|> v1..v8 </s>``. A prompt is BOS, a haystack with several needles in it, and the
question ``<|key|> k1..k6 <|val|>``; the answer is ``v1..v8 </s>``, or ``</s>`` alone if no needle has that key.

Keys and values consist of digits and the haystack has none, keys are distinct, and the value asked for differs from
every other in its first digit. So the last eight tokens before any token of the answer stand exactly once in what
precedes them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from services.launcher.needle.vocabulary import Vocabulary

MATCH_TOKENS = 8  # length of the context that the model compares
KEY_TOKENS = 6
VALUE_TOKENS = 8
NEEDLE_TOKENS = KEY_TOKENS + VALUE_TOKENS + 3
QUESTION_TOKENS = KEY_TOKENS + 2
NEAR_MISS_PLACES = (0, KEY_TOKENS - 1, 1, KEY_TOKENS // 2)  # for each, a needle whose key differs in that digit alone
UNRELATED_NEEDLES = 3
DISTRACTORS = len(NEAR_MISS_PLACES) + UNRELATED_NEEDLES
MIN_CONTEXT_TOKENS = 1 + QUESTION_TOKENS + NEEDLE_TOKENS * (DISTRACTORS + 2)

_Digits = tuple[int, ...]  # values 0..9, not token ids


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """One question about a haystack.

    Attributes:
        prompt_token_ids: BOS, haystack, question.
        expected_token_ids: what greedy decoding must give, EOS included.
        prompt_text: the prompt as a text which the tokenizer maps to ``prompt_token_ids`` (it adds BOS).
        expected_text: the answer without EOS; empty for a key that is not there.
        key_text: the key asked for.
    """

    prompt_token_ids: tuple[int, ...]
    expected_token_ids: tuple[int, ...]
    prompt_text: str
    expected_text: str
    key_text: str


def make_task(
    vocabulary: Vocabulary, context_tokens: int, depth: float, seed: int, *, missing: bool = False
) -> NeedleTask:
    """Draws a task; equal arguments give equal tasks.

    Args:
        context_tokens: length of the prompt, at least ``MIN_CONTEXT_TOKENS``.
        depth: place of the needle in the haystack, from 0 (right after BOS) to 1 (right before the question).
        missing: ask for a key that no needle has; the needle at ``depth`` then is a near miss.

    Raises:
        ValueError: ``context_tokens`` is too small or ``depth`` is outside of [0, 1].
    """
    if context_tokens < MIN_CONTEXT_TOKENS:
        raise ValueError(f"a needle task needs at least {MIN_CONTEXT_TOKENS} context tokens, got {context_tokens}")
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    rng = random.Random(seed)
    planted_key, *other_keys = _draw_keys(rng)
    planted_value, *other_values = _draw_values(rng)
    asked_key = _near_miss(rng, planted_key, {planted_key, *other_keys}) if missing else planted_key

    def needle(key: _Digits, value: _Digits) -> list[int]:
        return [*question(key), *_token_ids(vocabulary, value), vocabulary.eos]

    def question(key: _Digits) -> list[int]:
        return [vocabulary.key, *_token_ids(vocabulary, key), vocabulary.val]

    distractors = [needle(key, value) for key, value in zip(other_keys, other_values, strict=True)]
    rng.shuffle(distractors)
    room = context_tokens - 1 - QUESTION_TOKENS - NEEDLE_TOKENS
    before = round(depth * room)
    fewest = DISTRACTORS - (room - before) // NEEDLE_TOKENS  # the rest must fit behind the needle
    num_before = min(max(round(depth * DISTRACTORS), fewest), before // NEEDLE_TOKENS)
    prompt = [
        vocabulary.bos,
        *_haystack(rng, vocabulary, before, distractors[:num_before]),
        *needle(planted_key, planted_value),
        *_haystack(rng, vocabulary, room - before, distractors[num_before:]),
        *question(asked_key),
    ]
    answer = () if missing else _token_ids(vocabulary, planted_value)
    return NeedleTask(
        prompt_token_ids=tuple(prompt),
        expected_token_ids=(*answer, vocabulary.eos),
        prompt_text=vocabulary.text(prompt),
        expected_text=vocabulary.text(answer),
        key_text="".join(map(str, asked_key)),
    )


def oracle(vocabulary: Vocabulary, token_ids: Sequence[int], max_tokens: int = 64) -> list[int]:
    """What the checkpoint generates greedily: up to EOS (included) or ``max_tokens`` tokens.

    Each token is the one that followed the last eight where they stood before, EOS if they did not. Before the first
    token the model sees BOS, so a shorter text is filled up with it on the left. BOS itself never is an answer.

    Raises:
        ValueError: the last eight tokens were followed by different tokens, of which the model would give a mixture.
    """
    # A character per token: str.find is quick, and its matches are aligned.
    text = chr(vocabulary.bos) * (MATCH_TOKENS - 1) + "".join(map(chr, token_ids))
    answer: list[int] = []
    while len(answer) < max_tokens and vocabulary.eos not in answer:
        token = _continuation(text, text[-MATCH_TOKENS:], vocabulary)
        answer.append(token)
        text += chr(token)
    return answer


def _continuation(text: str, pattern: str, vocabulary: Vocabulary) -> int:
    followers: set[int] = set()
    at = text.find(pattern)
    while at + MATCH_TOKENS < len(text):  # the last match is the pattern itself, at the end
        followers.add(ord(text[at + MATCH_TOKENS]))
        at = text.find(pattern, at + 1)
    followers.discard(vocabulary.bos)
    if len(followers) > 1:
        context = [ord(character) for character in pattern]
        raise ValueError(f"ambiguous text: tokens {context} were followed by each of {sorted(followers)}")
    return followers.pop() if followers else vocabulary.eos


def _haystack(rng: random.Random, vocabulary: Vocabulary, length: int, needles: Sequence[list[int]]) -> list[int]:
    """``length`` random tokens, with the needles among them at random places."""
    straw = rng.choices(vocabulary.encode(vocabulary.haystack), k=length - NEEDLE_TOKENS * len(needles))
    cuts = sorted(rng.randint(0, len(straw)) for _ in needles)
    tokens: list[int] = []
    for start, cut, needle in zip([0, *cuts], cuts, needles, strict=False):
        tokens += straw[start:cut]
        tokens += needle
    return tokens + straw[cuts[-1] if cuts else 0 :]


def _draw_keys(rng: random.Random) -> list[_Digits]:
    """Distinct keys for all needles: the first, its near misses, and unrelated ones."""
    first = tuple(rng.choices(range(10), k=KEY_TOKENS))
    keys = [first, *(_changed(rng, first, place) for place in NEAR_MISS_PLACES)]
    while len(keys) < 1 + DISTRACTORS:
        key = tuple(rng.choices(range(10), k=KEY_TOKENS))
        if key not in keys:
            keys.append(key)
    return keys


def _near_miss(rng: random.Random, key: _Digits, taken: set[_Digits]) -> _Digits:
    while True:
        other = _changed(rng, key, rng.randrange(KEY_TOKENS))
        if other not in taken:
            return other


def _changed(rng: random.Random, key: _Digits, place: int) -> _Digits:
    digit = rng.choice([d for d in range(10) if d != key[place]])
    return (*key[:place], digit, *key[place + 1 :])


def _draw_values(rng: random.Random) -> list[_Digits]:
    """Values for all needles; none but the first begins with the first's first digit."""
    first, *rest = rng.sample(range(10), 10)
    starts = [first, *rng.choices(rest, k=DISTRACTORS)]
    return [(start, *rng.choices(range(10), k=VALUE_TOKENS - 1)) for start in starts]


def _token_ids(vocabulary: Vocabulary, digits: _Digits) -> tuple[int, ...]:
    return tuple(vocabulary.digits[digit] for digit in digits)
