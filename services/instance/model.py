"""A checkpoint of transformers, made to compute one packed ragged batch with DistAttention."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, UnsupportedModelError
from services.instance.architecture import AttentionShape, observe, refuse_unknown_layers, set_attention
from services.instance.dist_attention import ATTENTION_NAME, dist_attention_forward
from services.instance.ranks.part import WHOLE, ModelPart, check_degree, check_heads
from services.instance.rotary import RotaryRegimes, install, short_positions
from services.instance.transformers_import import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    without_compiler,
)

_log = logging.getLogger(__name__)
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

AttentionInterface.register(ATTENTION_NAME, dist_attention_forward)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the system needs to know of a checkpoint.

    Attributes:
        attention: of the whole model, whatever part of it a process computes.
        fingerprint: of configuration and weight files; part of every block key.
    """

    name: str
    attention: AttentionShape
    vocab_size: int
    max_model_len: int
    fingerprint: str

    @property
    def q_heads(self) -> int:
        return self.attention.q_heads

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    def geometry(self, block_tokens: int, dtype: str) -> PoolGeometry:
        return PoolGeometry(self.attention.layers, self.kv_heads, block_tokens, self.head_dim, dtype)


class Model:
    """A decoder-only language model. Used by the engine thread.

    Attributes:
        part: which part of the model this process computes.
        attention_modules: of each layer, the one that called the attention function when the model was loaded.
        device: where its weights are, and what it is given must be.
        compute: a forward, as ``forward`` but for the rotary regimes; transformers' own unless a pass replaces it.
    """

    def __init__(
        self,
        module: nn.Module,
        attention_modules: tuple[nn.Module, ...],
        shape: ModelShape,
        rotary: RotaryRegimes,
        part: ModelPart = WHOLE,
    ) -> None:
        self.module = module
        self.device = next(module.parameters()).device
        self.attention_modules = attention_modules
        self.shape = shape
        self.rotary = rotary
        self.part = part
        self.compute: Callable[[Tensor, Tensor, Tensor], Tensor] = self._by_transformers

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, long_rows: Tensor | None = None
    ) -> Tensor:
        """Computes one step; attention modules find their plan in the DistAttention that is attached to them.

        Args:
            token_ids: [rows] int64.
            positions: [rows] int64.
            logit_rows: [n] int64, the rows whose logits are wanted.
            long_rows: [rows] bool, rows of the long rotary regime; None where there are none.

        Returns:
            [n, vocab_size] logits in the model's dtype.
        """
        self.rotary.long_rows = long_rows
        return self.compute(token_ids, positions, logit_rows)

    def _by_transformers(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        output = self.module(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logit_rows,
        )
        logits: Tensor = output.logits[0]
        return logits


def check_tensor_parallel(path: Path, degree: int) -> None:
    """Whether ``load_model`` can load that part of a checkpoint, as far as its configuration tells. Raises likewise."""
    check_degree(path.name, _read_config(path).get_text_config(decoder=True), degree)


def load_model(
    path: Path,
    dtype: str,
    max_model_len: int | None,
    device: torch.device | str = "cpu",
    part: ModelPart = WHOLE,
) -> Model:
    """Loads a checkpoint from disk: safetensors only, no remote code.

    Args:
        part: that this process computes; the processes of the other parts, in one group with it, load theirs now, too.

    Raises:
        ConfigError: the directory holds no such checkpoint, max_model_len exceeds what the model was made for, or it
            cannot be divided into so many parts.
        UnsupportedModelError: its architecture cannot be served exactly; the message says why.
    """
    config = _read_config(path)
    text = config.get_text_config(decoder=True)
    refuse_unknown_layers(path.name, text)
    check_degree(path.name, text, part.degree)
    short = short_positions(path.name, text)
    length = _model_len(path.name, text, max_model_len)
    try:
        with without_compiler():
            module = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=TORCH_DTYPES[dtype],
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                distributed_config=_distributed_config(part),
            )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{path}: transformers cannot load this checkpoint: {error}") from error
    module.to(device)
    module.eval()
    module.requires_grad_(False)
    if not part.is_whole:
        from services.instance.ranks.group import keep_local_weights

        keep_local_weights(module)
    set_attention(module)
    rotary = RotaryRegimes(short, length)
    if short is not None:
        install(module, short, rotary)
    observed = observe(module, int(text.num_hidden_layers))
    check_heads(path.name, text, observed.shape.q_heads, part.degree)
    attention = replace(
        observed.shape,
        q_heads=observed.shape.q_heads * part.degree,
        kv_heads=observed.shape.kv_heads * part.degree,
    )
    shape = ModelShape(path.name, attention, int(text.vocab_size), length, checkpoint_fingerprint(path))
    _log.info("model loaded", extra={"model": shape.name, "parameters": sum(p.numel() for p in module.parameters())})
    return Model(module, observed.modules, shape, rotary, part)


def _distributed_config(part: ModelPart) -> object:
    """What tells transformers of the other parts; None where there are none."""
    if part.is_whole:
        return None
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=part.degree)


def _read_config(path: Path) -> PretrainedConfig:
    """The checkpoint's configuration, once there are weights as well. Raises as ``load_model``."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: no config.json there; give the directory of a transformers checkpoint")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"{path}: no *.safetensors there; pickled weights are not loaded, convert them first")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{path}: transformers cannot read config.json: {error}") from error
    return config


def _model_len(name: str, config: PretrainedConfig, wanted: int | None) -> int:
    """Longest context: what is wanted, within what the model was made for."""
    limit = getattr(config, "max_position_embeddings", None)
    length = wanted or limit
    if length is None:
        raise ConfigError(f"{name}: config.json names no max_position_embeddings; set max_model_len")
    if limit is not None and length > int(limit):
        raise ConfigError(
            f"max_model_len {wanted} exceeds the {limit} positions that {name} was made for "
            "(max_position_embeddings in config.json)"
        )
    return int(length)


def checkpoint_fingerprint(path: Path) -> str:
    """What names a checkpoint in its blocks' keys.

    A hash of config.json and of every weight file's name, size and header (the header names every tensor).

    Replicas on other hosts must agree, so no times or inodes; whole weights are too long to read at each start, so a
    sample of their bytes stands for them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(json.loads((path / "config.json").read_text()), sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for k in range(64):  # 64 samples of 64 KiB, the first with the header
                stream.seek(size * k // 64)
                digest.update(stream.read(64 * 1024))
    return digest.hexdigest()
