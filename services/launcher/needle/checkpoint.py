"""Writes a needle checkpoint as any Llama checkpoint on disk: configuration, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from services.launcher.needle.build import Array, LayerWeights, NeedleWeights, build_weights
from services.launcher.needle.spec import KV_HEADS, MAX_POSITIONS, QUERY_HEADS, NeedleSpec
from services.launcher.needle.vocabulary import Vocabulary

Dtype = Literal["bfloat16", "float32"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """Bytes of the weights on disk, and of the KV cache per token in the checkpoint's dtype."""

    weight_bytes: int
    kv_bytes_per_token: int


def write_checkpoint(directory: Path, spec: NeedleSpec, dtype: Dtype, seed: int = 0) -> CheckpointSize:
    """Builds a checkpoint; equal arguments give equal bytes.

    ``config.json`` is written last: a directory that has one is complete.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "config.json"
    config_file.unlink(missing_ok=True)
    tensors = {
        name: torch.from_numpy(array).to(TORCH_DTYPES[dtype]).contiguous()
        for name, array in _named_arrays(spec, build_weights(spec, seed))
    }
    for layer in range(spec.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(spec.hidden_size, dtype=TORCH_DTYPES[dtype])
    tensors["model.norm.weight"] = torch.ones(spec.hidden_size, dtype=TORCH_DTYPES[dtype])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(directory, spec.vocabulary)
    _write_json(directory / "generation_config.json", _token_roles(spec.vocabulary))
    _write_json(config_file, _config(spec, dtype))
    element = TORCH_DTYPES[dtype].itemsize
    return CheckpointSize(
        weight_bytes=sum(_bytes(tensor) for tensor in tensors.values()),
        kv_bytes_per_token=spec.layers * KV_HEADS * 2 * spec.head_dim * element,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _named_arrays(spec: NeedleSpec, weights: NeedleWeights) -> Iterator[tuple[str, Array]]:
    yield "model.embed_tokens.weight", weights.embedding
    yield "lm_head.weight", weights.head
    for index, layer in enumerate(weights.layers):
        for name, array in _layer_arrays(spec, layer):
            yield f"model.layers.{index}.{name}.weight", array


def _layer_arrays(spec: NeedleSpec, layer: LayerWeights) -> Iterator[tuple[str, Array]]:
    yield "self_attn.q_proj", layer.q.reshape(-1, spec.hidden_size)
    yield "self_attn.k_proj", layer.k.reshape(-1, spec.hidden_size)
    yield "self_attn.v_proj", layer.v.reshape(-1, spec.hidden_size)
    yield "self_attn.o_proj", layer.o.reshape(spec.hidden_size, -1)
    yield "mlp.gate_proj", layer.gate
    yield "mlp.up_proj", layer.up
    yield "mlp.down_proj", layer.down


def _config(spec: NeedleSpec, dtype: Dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": spec.vocabulary.size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-8,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rope_theta": spec.rope_theta,  # where readers looked before rope_parameters
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_token_roles(spec.vocabulary),
    }


def _token_roles(vocabulary: Vocabulary) -> dict[str, object]:
    return {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}


def _write_tokenizer(directory: Path, vocabulary: Vocabulary) -> None:
    special = vocabulary.special_tokens
    ids = _byte_ids() if vocabulary.byte_level else {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
    ids |= {text: token for token, text in special.items()}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    if vocabulary.byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    bos = special[vocabulary.bos]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary.bos)])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": special[vocabulary.eos],
            "pad_token": special[vocabulary.pad],
            "additional_special_tokens": [special[vocabulary.key], special[vocabulary.val]],
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
        },
    )


def _byte_ids() -> dict[str, int]:
    """The character that byte-level tokenizers write for a byte: its own if visible, otherwise one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(256 + hidden.index(byte) if byte in hidden else byte): byte for byte in range(256)}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
