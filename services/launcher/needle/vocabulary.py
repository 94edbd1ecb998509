"""The tokens of the needle checkpoint and their text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids and what they stand for.

    Attributes:
        size: number of token ids, a power of two; ids without a meaning are never generated.
        byte_level: ids 0..255 are the bytes of UTF-8 text; otherwise ``symbols`` are all the text there is.
        symbols: the text of ids 0 .. len(symbols) - 1, one character each.
        haystack: characters of the haystack, more frequent ones several times; no digits among them.
        bos, eos, pad: begin and end of a sequence, padding.
        key, val: stand before a needle's key and before its value.
    """

    size: int
    byte_level: bool
    symbols: str
    haystack: str
    bos: int
    eos: int
    pad: int
    key: int
    val: int

    @property
    def digits(self) -> tuple[int, ...]:
        """Ids of the characters 0-9, of which keys and values consist."""
        return self.encode(string.digits)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Text of the tokens that are no characters, by id."""
        return {self.bos: "<s>", self.eos: "</s>", self.pad: "<pad>", self.key: "<|key|>", self.val: "<|val|>"}

    def encode(self, characters: str) -> tuple[int, ...]:
        """Ids of a text without special tokens, one for each character.

        Raises:
            ValueError: a character is not in ``symbols``.
        """
        return tuple(self.symbols.index(character) for character in characters)

    def text(self, token_ids: Sequence[int]) -> str:
        """Text that the checkpoint's tokenizer maps to exactly these ids, without the leading BOS, which it adds."""
        text_of = dict(enumerate(self.symbols)) | self.special_tokens
        start = 1 if token_ids and token_ids[0] == self.bos else 0
        return "".join(text_of[token] for token in token_ids[start:])


STD_VOCABULARY = Vocabulary(
    size=512,
    byte_level=True,
    symbols="".join(map(chr, range(128))),
    haystack=string.ascii_lowercase + " " * 5,
    bos=256,
    eos=257,
    pad=258,
    key=259,
    val=260,
)

MINI_VOCABULARY = Vocabulary(
    size=32,
    byte_level=False,
    symbols=string.digits + "abcdefghijklmnop",
    haystack="abcdefghijklmnop",
    bos=26,
    eos=27,
    pad=28,
    key=29,
    val=30,
)
