"""Log-probabilities of prompts against transformers, with KV local, cached, remote, preempted and lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_rig import EngineRig
from reference import TOLERANCE
from scraped import scraped
from small_llama import VOCAB, write_small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from services.core.sequence import Request, SamplingParams, Sequence
from services.instance.logprobs import TokenLogprobs
from services.instance.scheduler import Scheduler

TOP = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_small_llama(path, seed=6)
    return path


@pytest.fixture(scope="module")
def precise(model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@torch.inference_mode()
def check(precise: LlamaForCausalLM, prompt: list[int], told: list[TokenLogprobs], top: int = TOP) -> None:
    """All of them are what transformers computes in float64."""
    expected: Tensor = precise(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(1)
    assert len(told) == len(prompt) - 1
    for position, (token, here) in enumerate(zip(prompt[1:], told, strict=True)):
        row = expected[position]
        assert here.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert len(here.top_ids) == top
        assert list(here.top_logprobs) == pytest.approx(row[list(here.top_ids)].tolist(), abs=TOLERANCE)
        assert list(here.top_logprobs) == pytest.approx(row.topk(top).values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("length", [2, 64, 65, 300])
def test_a_prompt_in_chunks(model: Path, precise: LlamaForCausalLM, length: int) -> None:
    prompt = prompt_of(length, length)
    with EngineRig(model, max_scored_tokens=50) as rig:
        rig.submit("r", prompt, 5, prompt_logprobs=TOP)
        rig.submit("plain", prompt_of(200, 1), 5)  # beside it, and without any
        rig.wait("r", "plain")
        check(precise, prompt, rig.prompt_logprobs("r"))
        assert not rig.prompt_logprobs("plain")
        rig.submit("again", prompt, 5)
        rig.wait("again")
        assert rig.tokens("again") == rig.tokens("r")
        rig.check_nothing_held()


def test_a_prompt_is_scored_and_nothing_drawn(model: Path, precise: LlamaForCausalLM) -> None:
    prompt = prompt_of(150, 2)
    with EngineRig(model) as rig:
        for name in ("first", "cached"):  # what is cached is computed all the same
            rig.submit(name, prompt, 0, prompt_logprobs=TOP)
            rig.wait(name)
            check(precise, prompt, rig.prompt_logprobs(name))
            assert rig.finish(name).reason == "length"
            assert not rig.tokens(name)
        # It has filled the cache for others.
        rig.submit("other", prompt, 1)
        rig.wait("other")
        assert rig.cached_tokens("other") == 128
        rig.check_nothing_held()


def test_most_of_a_prompt_lies_on_lenders(model: Path, precise: LlamaForCausalLM) -> None:
    prompt = prompt_of(1000, 3)  # 15 full blocks; the local pool keeps 4 beside its workspace
    with EngineRig(model, local_blocks=12, lenders=(10, 10)) as rig:
        rig.submit("r", prompt, 5, prompt_logprobs=TOP)
        rig.wait("r")
        assert all(stats.cached for stats in rig.stats()), "both lenders should have had some"
        check(precise, prompt, rig.prompt_logprobs("r"))
        rig.check_nothing_held()


def test_what_was_told_before_a_loss_is_not_told_again(model: Path, precise: LlamaForCausalLM) -> None:
    prompt = prompt_of(1000, 4)
    with EngineRig(model, local_blocks=12, lenders=(20,), max_scored_tokens=20) as rig:
        rig.submit("r", prompt, 5, prompt_logprobs=TOP)
        rig.wait_until(lambda: len(rig.prompt_logprobs("r")) > 600)
        rig.lenders[0].revoke()
        assert len(rig.prompt_logprobs("r")) < len(prompt) - 1
        rig.wait("r")
        check(precise, prompt, rig.prompt_logprobs("r"))
        assert scraped(rig.registry).by("reason", "infinite_llm_preemptions_total")["kvdaemon_lost"] == 1


def sequence(name: str, prompt_tokens: int, arrival: float, **sampling: int) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "seed": 0, "max_tokens": 9, **sampling})
    return Sequence(Request(name, (1,) * prompt_tokens, prompt_tokens, params, arrival, 1))


def test_rows_with_logits_are_bounded() -> None:
    scheduler = Scheduler(8, 512, max_scored_tokens=100)
    for item in (
        sequence("a", 80, 1, prompt_logprobs=1),
        sequence("b", 300, 2, prompt_logprobs=1),
        sequence("c", 300, 3, prompt_logprobs=1),
        sequence("plain", 300, 4),
    ):
        scheduler.add(item)
        scheduler.admit(item)
    batch = scheduler.schedule(lambda *_: True)
    assert [(item.sequence.request_id, item.count) for item in batch] == [("a", 80), ("b", 20), ("plain", 300)]
    assert [len(item.scored) for item in batch] == [79, 20, 0]
    assert [item.samples for item in batch] == [True, False, True]


def test_after_a_preemption_only_what_is_missing_has_logits_and_the_rest_may_be_cached() -> None:
    scheduler = Scheduler(8, 64, max_scored_tokens=1000)
    item = sequence("r", 100, 1, prompt_logprobs=1, max_tokens=0)
    assert item.cacheable == 0
    scheduler.add(item)
    scheduler.admit(item)
    (first,) = scheduler.schedule(lambda *_: True)
    assert first.scored == range(64)
    item.scored, item.computed = 65, 64
    scheduler.preempt(item)
    assert item.cacheable == 64
    scheduler.admit(item)
    (again,) = scheduler.schedule(lambda *_: True)
    assert not again.scored
    item.computed = 64
    (last,) = scheduler.schedule(lambda *_: True)
    assert last.scored == range(64, 99)
    assert not last.samples, "nothing is drawn"
    item.scored = 100
    assert item.cacheable == 99
