"""What the launcher reads of a checkpoint, so that a wrong directory is refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A model directory.

    Attributes:
        path: absolute.
        name: what the model is served as.
        has_tokenizer: text prompts are possible.
        layers, kv_heads, head_dim: shape of its KV cache; 0 where config.json does not say.
    """

    path: Path
    name: str
    has_tokenizer: bool
    layers: int
    kv_heads: int
    head_dim: int

    def geometry(self, block_tokens: int, dtype: str) -> PoolGeometry | None:
        """Shape of its rBlocks; None where config.json does not say enough."""
        if not (self.layers and self.kv_heads and self.head_dim):
            return None
        return PoolGeometry(self.layers, self.kv_heads, block_tokens, self.head_dim, dtype)


def inspect_checkpoint(directory: Path) -> CheckpointInfo:
    """Looks at config.json and at what files there are.

    Raises:
        ConfigError: the directory is no checkpoint.
    """
    path = directory.expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"--model {directory}: there is no such directory")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"--model {directory}: has no config.json; give the directory of a Hugging Face checkpoint")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"--model {directory}: has no *.safetensors; other weight formats are not read")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--model {directory}: config.json cannot be read: {exc}") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"--model {directory}: config.json is not a JSON object")
    text = config.get("text_config", config)
    heads = _positive(text, "num_attention_heads")
    head_dim = _positive(text, "head_dim") or (_positive(text, "hidden_size") // heads if heads else 0)
    return CheckpointInfo(
        path=path,
        name=path.name,
        has_tokenizer=(path / "tokenizer.json").is_file(),
        layers=_positive(text, "num_hidden_layers"),
        kv_heads=_positive(text, "num_key_value_heads") or heads,
        head_dim=head_dim,
    )


def _positive(config: object, key: str) -> int:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
