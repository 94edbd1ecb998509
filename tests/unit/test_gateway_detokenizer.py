"""Text from tokens, one at a time, with real tokenizers: never half a character, and nothing lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from services.core.errors import InvalidRequestError
from services.gateway.detokenizer import byte_of_character
from services.gateway.tokenizer import NoTokenizer, TextTokenizer

TEXT = "naïve 🦙🇨🇭 你好 — 日本語 👩‍👩‍👧 ende"


def byte_level() -> Tokenizer:
    """Byte-level BPE with one token a byte and a few merges, one of which crosses a character's border."""
    character = {byte: char for char, byte in byte_of_character().items()}
    vocab = {character[byte]: byte for byte in range(256)}
    merges = [("l", "o"), (character[0xE4], character[0xBD]), (character[0xA0], character[0xE5])]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("plain→added")])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As in Llama 2: ▁ for a space, byte fallback for what the vocabulary lacks, the first space stripped."""
    words = ["▁", "▁hello", "▁world", "h", "e", "l", "o", "a", "b", "▁a"]
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocab |= {word: len(vocab) + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def pieces(tokenizer: TextTokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


BYTES = TextTokenizer(byte_level())
BYTES_PLAIN = byte_level()
SPM = TextTokenizer(sentencepiece())
SPM_PLAIN = sentencepiece()


@given(st.lists(st.integers(0, 262), max_size=40))
def test_byte_level_equals_the_decoding_of_the_whole(ids: list[int]) -> None:
    # Garbage included: bytes that never become a character give U+FFFD at the same places.
    assert "".join(pieces(BYTES, ids)) == BYTES_PLAIN.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_byte_level_never_emits_half_a_character(text: str) -> None:
    ids = BYTES_PLAIN.encode(text).ids
    emitted = pieces(BYTES, ids)
    assert "".join(emitted) == text
    assert emitted[-1] == ""
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in emitted)


def test_what_is_held_back_comes_at_the_end() -> None:
    ids = BYTES_PLAIN.encode("a🦙").ids
    assert pieces(BYTES, ids[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_character_begun_by_the_prompt_is_finished() -> None:
    ids = BYTES_PLAIN.encode("x🦙").ids
    assert pieces(BYTES, ids[3:], prompt=tuple(ids[:3])) == ["", "🦙", ""]


def test_special_tokens_are_not_shown_and_added_ones_are() -> None:
    ids = [*BYTES_PLAIN.encode("a").ids, BYTES_PLAIN.token_to_id("<|end|>"), BYTES_PLAIN.token_to_id("plain→added")]
    assert pieces(BYTES, ids) == ["a", "", "plain→added", ""]


@pytest.mark.parametrize("text", [TEXT, "hello a a", "a 你 a", "🦙"])
def test_byte_fallback(text: str) -> None:
    ids = SPM_PLAIN.encode(text).ids
    emitted = pieces(SPM, ids)
    assert "".join(emitted) == text
    assert all("\ufffd" not in piece for piece in emitted)


def test_byte_fallback_of_broken_bytes() -> None:
    # One valid character between broken ones: the library gives U+FFFD for all, here the whole one survives.
    ids = [byte + 2 for byte in (0xE4, *"你".encode(), 0xF0)] + [SPM_PLAIN.token_to_id("▁world")]
    assert pieces(SPM, ids) == ["", "\ufffd", "", "你", "", "\ufffd world", ""]


def test_the_space_between_prompt_and_answer_stays() -> None:
    world = SPM_PLAIN.token_to_id("▁world")
    assert pieces(SPM, [world], prompt=(1, SPM_PLAIN.token_to_id("▁hello"))) == [" world", ""]
    assert pieces(SPM, [world], prompt=(1,)) == ["world", ""]


def test_wordpiece() -> None:
    plain = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3, ".": 4}, unk_token="[UNK]"))
    plain.decoder = decoders.WordPiece()
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|\."), "isolated")
    assert pieces(TextTokenizer(plain), [1, 2, 3, 4]) == ["play", "ing", " now", ".", ""]


def test_a_vocabulary_smaller_than_the_model() -> None:
    assert pieces(BYTES, [ord("a"), 100_000]) == ["a", "", ""]
    assert pieces(SPM, [100_000, SPM_PLAIN.token_to_id("▁a")]) == ["", "a", ""]


def test_token_text_for_display() -> None:
    assert BYTES.token_text(ord("a")) == "a"
    assert BYTES.token_text(BYTES_PLAIN.token_to_id("<|end|>")) == "<|end|>"
    assert BYTES.token_text(0xE4) == "ä"  # the vocabulary's name of the byte, not U+FFFD
    assert SPM.token_text(SPM_PLAIN.token_to_id("▁world")) == " world"
    assert SPM.token_text(0xE4 + 2) == "<0xE4>"
    assert NoTokenizer().token_text(7) == "token_id:7"


def test_encoding() -> None:
    plain = sentencepiece()
    plain.enable_truncation(2)
    plain.enable_padding(length=50)
    assert len(asyncio.run(TextTokenizer(plain).encode("hello a a"))) > 2
    assert asyncio.run(TextTokenizer(sentencepiece(), "<s>").encode("a"))[:2] != [1, 1]
    bytes_with_bos = TextTokenizer(byte_level(), "<|end|>")
    assert asyncio.run(bytes_with_bos.encode("a")) == [BYTES_PLAIN.token_to_id("<|end|>"), ord("a")]
    with pytest.raises(InvalidRequestError, match="token ids"):
        asyncio.run(NoTokenizer().encode("a"))
    with pytest.raises(InvalidRequestError, match="surrogates"):
        asyncio.run(BYTES.encode("\ud800"))
