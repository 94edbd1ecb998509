"""A checkpoint of transformers, made to compute one packed ragged batch with DistAttention."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import AttentionInterface

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, UnsupportedModelError
from services.instance.dist_attention import ATTENTION_NAME, dist_attention_forward

_log = logging.getLogger(__name__)
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROTARY_THAT_DEPENDS_ON_LENGTH = ("dynamic", "longrope")

AttentionInterface.register(ATTENTION_NAME, dist_attention_forward)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the system needs to know of a checkpoint.

    Attributes:
        fingerprint: of configuration and weight files; part of every block key.
    """

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    fingerprint: str

    def geometry(self, block_tokens: int, dtype: str) -> PoolGeometry:
        return PoolGeometry(self.layers, self.kv_heads, block_tokens, self.head_dim, dtype)


class Model:
    """A decoder-only language model. Used by the engine thread."""

    def __init__(self, module: nn.Module, shape: ModelShape) -> None:
        self.module = module
        self.shape = shape

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """Computes one step; attention modules find their plan in the DistAttention that is attached to them.

        Args:
            token_ids: [rows] int64.
            positions: [rows] int64.
            logit_rows: [n] int64, the rows whose logits are wanted.

        Returns:
            [n, vocab_size] float32 logits.
        """
        output = self.module(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logit_rows,
        )
        logits: Tensor = output.logits[0]
        return logits.float()


def load_model(path: Path, dtype: str, max_model_len: int | None) -> Model:
    """Loads a checkpoint from disk: safetensors only, no remote code.

    Raises:
        ConfigError: the directory holds no such checkpoint, or max_model_len exceeds what the model was made for.
        UnsupportedModelError: its architecture cannot be served exactly; the message says why.
    """
    shape, config = read_shape(path, max_model_len)
    try:
        module = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{path}: transformers cannot load this checkpoint: {error}") from error
    module.eval()
    module.requires_grad_(False)
    _log.info("model loaded", extra={"model": shape.name, "parameters": sum(p.numel() for p in module.parameters())})
    return Model(module, shape)


def read_shape(path: Path, max_model_len: int | None) -> tuple[ModelShape, PretrainedConfig]:
    """Reads the checkpoint's configuration. Raises as ``load_model``."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no config.json there; give the directory of a transformers checkpoint")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{path}: no *.safetensors there; pickled weights are not loaded, convert them first")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{path}: transformers cannot read config.json: {error}") from error
    text = config.get_text_config(decoder=True)
    _refuse_length_dependent_rotary(path, text)
    q_heads = int(text.num_attention_heads)
    limit = int(text.max_position_embeddings)
    if max_model_len is not None and max_model_len > limit:
        raise ConfigError(
            f"max_model_len {max_model_len} exceeds the {limit} positions that {path.name} was made for "
            "(max_position_embeddings in config.json)"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // q_heads
    shape = ModelShape(
        name=path.name,
        layers=int(text.num_hidden_layers),
        q_heads=q_heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or q_heads),
        head_dim=int(head_dim),
        vocab_size=int(text.vocab_size),
        max_model_len=max_model_len or limit,
        fingerprint=_fingerprint(path, weights),
    )
    return shape, config


def _refuse_length_dependent_rotary(path: Path, config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    for variant in variants:
        if variant.get("rope_type") in _ROTARY_THAT_DEPENDS_ON_LENGTH:
            raise UnsupportedModelError(
                f"{path.name}: rotary type {variant['rope_type']!r} changes the frequencies with the longest position "
                "in a batch, so keys that are stored once would be wrong later"
            )


def _fingerprint(path: Path, weights: list[Path]) -> str:
    """Hash of config.json and of every weight file's name, size and header (the header names every tensor).

    Replicas on other hosts must agree, so no times or inodes; whole weights are too long to read at each start, so a
    sample of their bytes stands for them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(json.loads((path / "config.json").read_text()), sort_keys=True).encode())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for k in range(64):  # 64 samples of 64 KiB, the first with the header
                stream.seek(size * k // 64)
                digest.update(stream.read(64 * 1024))
    return digest.hexdigest()
