"""Structures (``services/core/structure.py``) as automata over a model's tokens, by llguidance.

A gateway compiles them to refuse what is wrong, an instance to draw by them. Nothing is loaded before the first one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, grammar_from
from numpy.typing import NDArray

from services.core.errors import InvalidRequestError
from services.core.structure import Structure

_KEPT = 128  # compiled structures
# Compiling recurses as deeply as rules refer to one another; a structure of the greatest length needs some 100 MiB.
_STACK_BYTES = 512 << 20
_MOST_ERROR_CHARACTERS = 400
# Without a bound, a model that likes white space better than what comes next never ends.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"


class GrammarState:
    """Where an answer is in its structure. It depends on the answer's tokens alone."""

    def __init__(self, matcher: LLMatcher, end: int, vocab_size: int, asked_by: str) -> None:
        self._matcher = matcher
        self._end = end
        self._vocab_size = vocab_size
        self._asked_by = asked_by
        self._taken = 0

    @property
    def complete(self) -> bool:
        """The answer may end here."""
        return bool(self._matcher.is_accepting())

    def take(self, answer: Sequence[int]) -> None:
        """Goes on to the end of the answer so far, which only grows. Raises as ``allowed``."""
        new = list(answer[self._taken :])
        if not self._matcher.consume_tokens(new):
            raise self._failed()
        self._taken += len(new)

    def allowed(self) -> NDArray[np.bool_]:
        """Tokens that may come next, [vocab_size]; none where the answer can only end.

        Raises:
            InvalidRequestError: no token of the vocabulary can go on, or it would take too long to find out.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._failed()
        allowed = np.zeros(self._vocab_size, dtype=bool)
        unpacked = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(unpacked)] = unpacked
        if self._end < self._vocab_size:
            allowed[self._end] = False
        return allowed

    def _failed(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._asked_by}: no token of this model's vocabulary continues the answer after {self._taken} tokens, "
            f"or it is too complex to find one ({_first_lines(self._matcher.get_error())})"
        )


class Grammars:
    """Compiles structures for one checkpoint. May be used by several threads.

    Args:
        directory: of the checkpoint, with tokenizer.json.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._path = directory / "tokenizer.json"
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._tokenizer: tuple[LLTokenizer, int] | None = None
        self._compiling: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[Structure, LLMatcher] = OrderedDict()  # never used, only copied; oldest first

    def start(self, structure: Structure) -> GrammarState:
        """The state before the first token. Takes up to a second for a large structure that is new.

        Raises:
            InvalidRequestError: it is wrong, too complex, or this model has no suitable tokenizer; names the field.
        """
        with self._loading:
            tokenizer, end = self._load(structure.asked_by)
            compiling = self._compiling = self._compiling or _deep_thread()
        with self._lock:
            matcher = self._compiled.pop(structure, None)
        if matcher is None:  # compiled without the lock: who needs a known one does not wait
            matcher = compiling.submit(_compile, structure, tokenizer).result()
        with self._lock:
            self._compiled[structure] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return GrammarState(matcher.deep_copy(), end, self._vocab_size, structure.asked_by)

    def _load(self, asked_by: str) -> tuple[LLTokenizer, int]:
        """The tokenizer, and the special token that stands for the end in it; which one does not matter."""
        if self._tokenizer is not None:
            return self._tokenizer
        try:
            text = self._path.read_text(encoding="utf-8")
            special = [token["id"] for token in json.loads(text)["added_tokens"] if token["special"]]
            if not special:
                raise ValueError("it has no special tokens")
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=special[0]), special[0]
        except FileNotFoundError:
            raise InvalidRequestError(f"{asked_by}: this model has no tokenizer, so its answers have no text") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"{asked_by}: this model's tokenizer.json does not serve for structured outputs: {error}"
            ) from error
        return self._tokenizer


def _deep_thread() -> ThreadPoolExecutor:
    """One thread whose stack suffices. Only one: however many structures come, they take one core."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    before = threading.stack_size(_STACK_BYTES)
    try:
        executor.submit(int).result()  # starts the thread
    finally:
        threading.stack_size(before)
    return executor


def json_grammar(schema: dict[str, Any]) -> str:
    """A schema as llguidance reads it, in one line."""
    return json.dumps({"x-guidance": {"whitespace_pattern": _WHITE_SPACE}, **schema})


def _compile(structure: Structure, tokenizer: LLTokenizer) -> LLMatcher:
    """Raises InvalidRequestError."""
    try:
        if structure.kind == "json_schema":
            schema = json.loads(structure.text)
            if not isinstance(schema, dict):
                raise ValueError("a schema is a JSON object")
            grammar = LLMatcher.grammar_from_json_schema(json_grammar(schema))
        else:
            grammar = grammar_from(structure.kind, structure.text)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # finds out that nothing fits at all
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{structure.asked_by}: not a valid {structure.kind}: {error}") from error
    if matcher.is_error():
        raise InvalidRequestError(
            f"{structure.asked_by}: not a valid {structure.kind}: {_first_lines(matcher.get_error())}"
        )
    return matcher


def _first_lines(error: str) -> str:
    """Without the dump of the parser's state that may follow."""
    return error.partition("\n<state>")[0].strip()[:_MOST_ERROR_CHARACTERS]
