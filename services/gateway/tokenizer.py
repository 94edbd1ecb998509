"""The tokenizer of the served checkpoint: text to ids in a thread, ids to text in the Detokenizer that fits it.

Only the ``tokenizers`` library is used (a few megabytes); the event loop never waits for a long prompt's tokenization.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from services.core.errors import ConfigError, InvalidRequestError
from services.gateway.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    ContextDetokenizer,
    Detokenizer,
    NoDetokenizer,
    byte_of_character,
)


class Tokenizer(Protocol):
    """Text and token ids of one model.

    Attributes:
        has_text: False where there are token ids only.
    """

    has_text: bool

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A prompt's token ids, with the special tokens the model expects in front of it, unless the text has them.

        Raises InvalidRequestError.
        """

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included. Raises InvalidRequestError."""

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """The text that follows this prompt."""

    def token_text(self, token_id: int) -> str:
        """One token for display, in the middle of a text. A part of a character is shown as in the vocabulary."""

    def is_special(self, token_id: int) -> bool:
        """Whether it is no part of an answer's text."""

    def close(self) -> None:
        """Ends the threads."""


class NoTokenizer:
    """A checkpoint without tokenizer.json: prompts are token ids, and answers have no text."""

    has_text = False

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise InvalidRequestError("this model has no tokenizer: send the prompt as a list of token ids")

    async def decode(self, token_ids: Sequence[int]) -> str:
        raise InvalidRequestError("this model has no tokenizer: its token ids have no text")

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        return NoDetokenizer()

    def token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}"

    def is_special(self, token_id: int) -> bool:
        return False

    def close(self) -> None:
        return


class TextTokenizer:
    """tokenizer.json, by the ``tokenizers`` library.

    Args:
        tokenizer: the loaded tokenizer; belongs to this object from now on.
        bos_token: put before every prompt that does not start with it; "" puts none.
    """

    has_text = True

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos_token: str = "", threads: int = 1) -> None:
        # A checkpoint may carry the settings of its training: a prompt must neither be cut nor padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bos_id: int | None = tokenizer.token_to_id(bos_token) if bos_token else None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._hidden = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        decoders = set(_decoder_types(json.loads(tokenizer.to_str()).get("decoder")))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._bytes_by_character = byte_of_character()
        self._token_bytes = lru_cache(maxsize=None)(self._find_token_bytes)
        self._anchor = self._find_anchor()
        self.token_text = lru_cache(maxsize=65536)(self._find_token_text)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)

    async def decode(self, token_ids: Sequence[int]) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        )

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes, prompt_ids)
        return ContextDetokenizer(self._decode, self._token_string, self._hidden, prompt_ids)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._hidden

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidRequestError("prompt: the text has unpaired surrogates and is no valid Unicode") from exc
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _token_string(self, token_id: int) -> str:
        """The token in the vocabulary where byte tokens are bytes; "" where every token is text."""
        return (self._tokenizer.id_to_token(token_id) or "") if self._byte_fallback else ""

    def _find_token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token of byte-level BPE; an added token stands for its own text."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._hidden:
            return b""
        try:
            return bytes(self._bytes_by_character[character] for character in token)
        except KeyError:
            return str(token).encode()

    def _find_anchor(self) -> list[int]:
        """A token with a text, to be put before another one that must not be taken for the start of a text."""
        ids: list[int] = self._tokenizer.encode("a", add_special_tokens=False).ids
        return ids if self._decode(ids) else []

    def _find_token_text(self, token_id: int) -> str:
        if token_id in self._hidden:
            return str(self._tokenizer.id_to_token(token_id))
        text = self._decode([*self._anchor, token_id])[len(self._decode(self._anchor)) :]
        if REPLACEMENT in text:
            return str(self._tokenizer.id_to_token(token_id))
        return text


def load_tokenizer(directory: Path, bos_token: str, threads: int) -> Tokenizer:
    """The checkpoint's tokenizer. Raises ConfigError where tokenizer.json is there and cannot be read."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return NoTokenizer()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    return TextTokenizer(tokenizer, bos_token, threads)


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The kinds of decoders in a tokenizer.json's ``decoder``, nested ones included."""
    if decoder is None:
        return
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)
