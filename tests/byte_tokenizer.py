"""A tokenizer for tests: every byte is a token, so most characters are spread over several tokens; and an end."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.gateway.detokenizer import byte_of_character

EOS = 256


def write_byte_tokenizer(directory: Path) -> None:
    plain = Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken("<|end|>", special=True)])
    plain.save(str(directory / "tokenizer.json"))
