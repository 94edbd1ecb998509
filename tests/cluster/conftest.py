"""Checkpoints and a gateway for cluster tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from http_rig import HttpRig, running_rig
from random_llama import write_random_llama
from redis_process import RedisProcess
from transformers import LlamaForCausalLM

from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.spec import needle_spec


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See random_llama.py."""
    path = tmp_path_factory.mktemp("models") / "random-llama"
    write_random_llama(path)
    return path


@pytest.fixture(scope="session")
def needle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The needle checkpoint with six retrieve layers, so that every layer's KV is needed for an answer."""
    path = tmp_path_factory.mktemp("models") / "needle"
    write_checkpoint(path, needle_spec("std", layers=8), "bfloat16")
    return path


@pytest.fixture(scope="session")
def clear_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with logits so far apart that answers of hundreds of tokens have no near-tie."""
    path = tmp_path_factory.mktemp("models") / "clear-llama"
    write_random_llama(path, logit_scale=4.0)
    return path


Reference = Callable[[list[int], int], tuple[list[int], list[float]]]


@pytest.fixture(scope="session")
def greedy_reference(random_llama: Path) -> Reference:
    """transformers' own greedy continuation: tokens, and the margin between the best two logits at each."""
    return _greedy(random_llama)


@pytest.fixture(scope="session")
def clear_reference(clear_llama: Path) -> Reference:
    """The same of ``clear_llama``."""
    return _greedy(clear_llama)


def _greedy(path: Path) -> Reference:
    torch.set_num_threads(1)  # clusters compute beside it, and threads that wait for each other are slower than one
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")

    @cache
    def generate(prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        tokens = torch.tensor([prompt])
        answer = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        top = torch.stack([logits[0] for logits in answer.logits]).topk(2).values
        return answer.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()

    return lambda prompt, count: generate(tuple(prompt), count)


@pytest.fixture(scope="module")
def http_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpRig]:
    """Shared by a file's tests: see http_rig.py."""
    with running_rig(tmp_path_factory.mktemp("gateway")) as rig:
        yield rig


@pytest.fixture
def redis_process(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    yield process
    process.signal(signal.SIGKILL)
