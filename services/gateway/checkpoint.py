"""What the gateway needs to know of a checkpoint: its limits and its special tokens, read from its JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.core.errors import ConfigError

_POSITIONS = ("max_position_embeddings", "n_positions")  # the second is GPT-2's and GPT-J's name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One served model.

    Attributes:
        name: what clients call it.
        directory: where it lies.
        vocab_size: token ids are below it.
        max_model_len: tokens of prompt and answer together.
        eos_ids: tokens that end an answer.
        bos_token: put before a text prompt where tokenizer.json does not do so itself; "" where none is.
    """

    name: str
    directory: Path
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    bos_token: str


def load_checkpoint(directory: Path, name: str | None, max_model_len: int | None) -> Checkpoint:
    """Reads a checkpoint's JSON files.

    Args:
        name: None takes the directory's name.
        max_model_len: a limit below the model's own.
    Raises: ConfigError, naming the file and the key.
    """
    config = _read(directory / "config.json")
    if config is None:
        raise ConfigError(f"model: {directory} has no config.json; it must be a Hugging Face checkpoint's directory")
    generation = _read(directory / "generation_config.json") or {}
    tokenizer = _read(directory / "tokenizer_config.json") or {}
    # Models of several modalities keep the language model's numbers in a section of their own.
    text = config.get("text_config", config)
    vocab_size = _positive(text, "vocab_size", directory)
    own_limit = _positive(text, next((key for key in _POSITIONS if key in text), _POSITIONS[0]), directory)
    if max_model_len is not None and max_model_len > own_limit:
        raise ConfigError(f"max_model_len: {max_model_len} is more than the checkpoint's {own_limit} positions")
    eos_ids = (
        _token_ids(generation.get("eos_token_id"))
        or _token_ids(text.get("eos_token_id"))
        or _token_ids(config.get("eos_token_id"))
    )
    return Checkpoint(
        name=name or directory.resolve().name,
        directory=directory,
        vocab_size=vocab_size,
        max_model_len=max_model_len or own_limit,
        eos_ids=eos_ids,
        bos_token=_token_text(tokenizer.get("bos_token")) if tokenizer.get("add_bos_token") is True else "",
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return data


def _positive(config: dict[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{directory / 'config.json'}: {key} must be a positive integer, got {value!r}")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    candidates = value if isinstance(value, list) else [value]
    return tuple(item for item in candidates if isinstance(item, int) and not isinstance(item, bool))


def _token_text(value: object) -> str:
    """A token's text, which older files wrap in an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
