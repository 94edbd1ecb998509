"""bfloat16: the answers' distributions are at least as near to exact arithmetic as transformers' own bfloat16."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from architectures import VOCAB_SIZE, Architecture, served
from engine_rig import EngineRig
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.instance.engine import TokenOutput

REQUESTS, COUNT = 10, 100  # 1,000 positions
# Heads of whole vectors of pairs, with which prefill has its fastest and least exact products.
SHAPE = {"head_dim": 32, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "initializer_range": 0.1}


def make_checkpoint(name: str, directory: Path) -> Path:
    """bfloat16 on disk, so that everybody computes with the same weights."""
    original = served(name)
    settings = {**original.settings, **SHAPE}
    if "layer_types" in settings:
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    exact = Architecture(name, original.config, settings).write(directory / "exact")
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16)
    model.save_pretrained(directory / name)
    return directory / name


def by_engine(path: Path, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens and the log-probabilities of all tokens at their positions, most KV on lenders, in bfloat16."""
    with EngineRig(path, local_blocks=13, lenders=(10, 10), dtype="bfloat16") as rig:
        for n, prompt in enumerate(prompts):
            rig.submit(f"r{n}", prompt, COUNT, logprobs=VOCAB_SIZE)
        names = [f"r{n}" for n in range(len(prompts))]
        rig.wait(*names)
        assert sum(len(daemon.queries) for daemon in rig.lenders) > 0
        rows = []
        for name in names:
            for output in rig.outputs:
                if isinstance(output, TokenOutput) and output.request_id == name:
                    assert output.logprobs is not None
                    row = torch.empty(VOCAB_SIZE, dtype=torch.float64)
                    row[list(output.logprobs.top_ids)] = torch.tensor(output.logprobs.top_logprobs, dtype=torch.float64)
                    rows.append(row)
        return [rig.tokens(name) for name in names], torch.stack(rows)


@torch.inference_mode()
def by_transformers(path: Path, dtype: torch.dtype, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """The same log-probabilities by eager attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].double().log_softmax(1))
    return torch.cat(rows)


def divergence(exact: Tensor, approximate: Tensor) -> float:
    """Mean over the positions of the Kullback-Leibler divergence."""
    return float((exact.exp() * (exact - approximate)).sum(1).mean())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_no_further_from_exact_than_transformers(name: str, tmp_path: Path):
    path = make_checkpoint(name, tmp_path)
    choose = random.Random(11)
    prompts = [choose.choices(range(VOCAB_SIZE), k=120 + 30 * n) for n in range(REQUESTS)]
    answers, ours = by_engine(path, prompts)
    exact = by_transformers(path, torch.float64, prompts, answers)
    theirs = by_transformers(path, torch.bfloat16, prompts, answers)
    assert ours.shape == (REQUESTS * COUNT, VOCAB_SIZE)
    assert divergence(exact, ours) <= 1.1 * divergence(exact, theirs)
