"""Small random checkpoints of many architectures, made by transformers itself, with every trap switched on.

Head sizes are not hidden_size / heads, windows are no multiple of a block, layers differ where they may, and everything
that initialises to a constant (norms, biases, sinks) is made random, so that leaving it out would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig

VOCAB_SIZE = 256
WINDOW = 100
ORIGINAL_POSITIONS = 256  # where the frequencies of longrope change

_COMMON: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS: Mapping[str, object] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_NO_GROUPS = ("num_key_value_heads",)


@dataclass(frozen=True)
class Architecture:
    """One checkpoint.

    Attributes:
        config: class in transformers.
        settings: of the configuration, beside the common ones.
        without: common settings that the configuration does not take.
        seed: of the weights, chosen so that ties between logits are rare.
    """

    name: str
    config: str
    settings: Mapping[str, object] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    seed: int = 1

    def make_config(self) -> PretrainedConfig:
        settings = {key: value for key, value in _COMMON.items() if key not in self.without}
        cls = getattr(transformers, self.config)
        made: PretrainedConfig = cls(**{**settings, **self.settings})
        return made

    def write(self, path: Path) -> Path:
        """Saves the checkpoint, float32."""
        torch.manual_seed(self.seed)
        model = transformers.AutoModelForCausalLM.from_config(self.make_config(), attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.add_(4)  # e^4 keys of score 0: half of the weight
                if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.get_output_embeddings().weight.mul_(4)  # logits far apart: ties are rare
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        model.save_pretrained(path)
        return path


def _rope(**settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


_LIMIT: Mapping[str, object] = {"original_max_position_embeddings": ORIGINAL_POSITIONS}
_LONGROPE: Mapping[str, object] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 1.5 * i for i in range(16)],
    **_LIMIT,
}
_LLAMA3: Mapping[str, object] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN: Mapping[str, object] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}

SERVED = (
    Architecture("llama", "LlamaConfig", {"head_dim": 32, "attention_bias": True}),
    Architecture("llama-llama3", "LlamaConfig", _rope(**_LLAMA3)),
    Architecture("llama-linear", "LlamaConfig", _rope(rope_type="linear", factor=4.0)),
    Architecture("llama-yarn", "LlamaConfig", _rope(**_YARN)),
    Architecture(
        "qwen2", "Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    Architecture("qwen3", "Qwen3Config", {"head_dim": 32}),
    Architecture("mistral", "MistralConfig", {"sliding_window": WINDOW, "head_dim": 32}),
    Architecture(
        "gemma2",
        "Gemma2Config",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    Architecture(
        "gemma3",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    Architecture(  # two widths of heads in one model
        "gemma4",
        "Gemma4TextConfig",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 0,
        },
    ),
    Architecture("phi3", "Phi3Config", {"sliding_window": 300, "hidden_size": 128, **_LIMIT, **_rope(**_LONGROPE)}),
    Architecture(
        "phimoe",
        "PhimoeConfig",
        {"hidden_size": 128, **_rope(short_mscale=1.1, long_mscale=1.3, **_LONGROPE), **_EXPERTS},
        seed=3,
    ),
    Architecture("olmo2", "Olmo2Config", seed=2),
    Architecture("olmo3", "Olmo3Config", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    Architecture(
        "granite",
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.11,
        },
    ),
    Architecture(
        "stablelm",
        "StableLmConfig",
        {
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "hidden_size": 64,
            **_rope(rope_type="default", partial_rotary_factor=0.25),
        },
    ),
    Architecture("mixtral", "MixtralConfig", {"sliding_window": WINDOW, "head_dim": 32, **_EXPERTS}),
    Architecture(
        "qwen3-moe",
        "Qwen3MoeConfig",
        {"head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1], **_EXPERTS},
    ),
    Architecture(
        "gpt-oss",
        "GptOssConfig",
        {"head_dim": 32, "sliding_window": WINDOW, "layer_types": _ALTERNATING, **_rope(**_YARN), **_EXPERTS},
    ),
    Architecture(
        "cohere2",
        "Cohere2Config",
        {"head_dim": 32, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "logit_scale": 0.4},
    ),
    Architecture(  # latent attention: keys of 24, values of 12
        "deepseek-v3",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    Architecture(
        "phi", "PhiConfig", {"num_key_value_heads": 4, **_rope(rope_type="default", partial_rotary_factor=0.5)}
    ),
    Architecture("gpt-neox", "GPTNeoXConfig", {"rotary_pct": 0.25}, without=_NO_GROUPS),
    Architecture("gpt2", "GPT2Config", {"scale_attn_by_inverse_layer_idx": True}, without=_NO_GROUPS),
    Architecture("opt", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 48}, without=_NO_GROUPS),
    Architecture("starcoder2", "Starcoder2Config", {"sliding_window": WINDOW}),
    Architecture("smollm3", "SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    Architecture("glm4", "Glm4Config", {"head_dim": 32}),
    Architecture("exaone4", "Exaone4Config", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    Architecture("nemotron", "NemotronConfig"),
)

_NEVER_CALLED = "never calls the attention function"
_CHUNKS: Mapping[str, object] = {"attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}

REFUSED: tuple[tuple[Architecture, str], ...] = (
    (Architecture("falcon", "FalconConfig"), _NEVER_CALLED),
    (Architecture("bloom", "BloomConfig"), _NEVER_CALLED),
    (Architecture("mpt", "MptConfig", {"d_model": 48, "n_heads": 4, "n_layers": 3}), _NEVER_CALLED),
    (Architecture("gptj", "GPTJConfig", {"rotary_dim": 4}), "AttentionInterface"),
    (Architecture("llama-dynamic", "LlamaConfig", _rope(rope_type="dynamic", factor=4.0)), "rotary type 'dynamic'"),
    (Architecture("llama4", "Llama4TextConfig", {"intermediate_size_mlp": 64, **_CHUNKS}), "'chunked_attention'"),
    (Architecture("lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}), "'conv'"),
    (Architecture("mamba", "MambaConfig", {"state_size": 4}), "'linear_attention'"),
)


def served(name: str) -> Architecture:
    return next(architecture for architecture in SERVED if architecture.name == name)
