"""Token ids to text, one at a time, never half a character.

A character may be spread over several tokens, because a token may stand for single bytes of its UTF-8 form. The bytes
of an unfinished character are held back until it is whole, or until what follows shows that it never will be; it is
then U+FFFD, as in a decoding of the whole sequence.

``ByteLevelDetokenizer`` is for byte-level BPE (GPT-2, Llama 3, Qwen), where a token *is* a sequence of bytes: its text
equals the decoding of the whole sequence exactly. ``ContextDetokenizer`` is for everything else (SentencePiece with
byte fallback, WordPiece), where a token's text depends on the one before: it is what the token adds to that one's text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A UTF-8 character has at most 4 bytes, so at most 4 tokens.
_CHARACTER_TOKENS = 4

Decode = Callable[[Sequence[int]], str]


class Detokenizer(Protocol):
    """The text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """What this token adds to the text."""

    def flush(self) -> str:
        """The end of the text: what is still held back."""


class NoDetokenizer:
    """For a checkpoint without a tokenizer: there is no text."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _Utf8:
    """Bytes in, whole characters out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class ByteLevelDetokenizer:
    """Byte-level BPE.

    Args:
        token_bytes: answers a token's bytes; b"" for tokens that are not shown.
        prompt_ids: the tokens before; a character begun by the last of them is finished here.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], prompt_ids: Sequence[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = _Utf8()
        for token_id in prompt_ids[-_CHARACTER_TOKENS:]:
            self._utf8.push(token_bytes(token_id))

    def push(self, token_id: int) -> str:
        return self._utf8.push(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.flush()


class ContextDetokenizer:
    """Any other tokenizer.

    Args:
        decode: the tokenizer's decoding of a whole sequence, special tokens skipped.
        token_string: a token's own string in the vocabulary; "<0x41>" is a byte.
        prompt_ids: the tokens before.
    """

    def __init__(
        self, decode: Decode, token_string: Callable[[int], str], hidden: frozenset[int], prompt_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._token_string = token_string
        self._hidden = hidden
        self._utf8 = _Utf8()
        # The last token that is shown, and its text were it alone.
        self._context: list[int] = []
        self._context_text = ""
        for token_id in prompt_ids[-_CHARACTER_TOKENS:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        byte = _BYTE_TOKEN.fullmatch(self._token_string(token_id))
        if byte is not None:
            text = self._utf8.push(bytes.fromhex(byte[1]))
        else:
            broken = self._utf8.flush()
            text = broken + self._decode([*self._context, token_id])[len(self._context_text) :]
        self._context = [token_id]
        self._context_text = self._decode(self._context)
        return text

    def flush(self) -> str:
        return self._utf8.flush()


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in table]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
