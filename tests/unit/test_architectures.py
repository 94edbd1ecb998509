"""Every architecture through the whole engine: KV on lenders, chunked prefill, preemption, against transformers."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from architectures import ORIGINAL_POSITIONS, REFUSED, SERVED, VOCAB_SIZE, Architecture
from engine_rig import EngineRig
from reference import Reference

import kernels
from services.core.errors import UnsupportedModelError
from services.instance.model import load_model
from services.instance.outputs import TokenOutput
from services.instance.probe import probe

LONGROPE = ("phi3", "phimoe")


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def check(rig: EngineRig, name: str, reference: Reference, prompt: list[int], count: int) -> None:
    """Tokens and log-probabilities, of the prompt too, are those of transformers."""
    answer = reference.generate(prompt, count)
    outputs = [o for o in rig.outputs if isinstance(o, TokenOutput) and o.request_id == name]
    told = rig.prompt_logprobs(name)
    assert len(told) == len(prompt) - 1
    answer.check_prompt([here.top_ids for here in told], [here.top_logprobs for here in told])
    answer.check_prompt([[token] for token in prompt[1:]], [[here.logprob] for here in told])
    answer.check_tokens([output.token_id for output in outputs])
    for position, output in enumerate(outputs[: answer.exact]):
        assert output.logprobs is not None
        answer.check_logprobs(position, output.logprobs.top_ids, output.logprobs.top_logprobs)


@pytest.mark.parametrize("architecture", SERVED, ids=lambda architecture: architecture.name)
def test_equal_to_transformers(architecture: Architecture, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Four requests of mixed lengths; most KV lies on lenders, and all together have no room to grow to their end.

    The prompts' 14 full blocks are all there is beside the workspace and four tails. Every answer
    needs two further blocks, the second before anybody is done: at most two get the first, and somebody must go.
    """
    path = architecture.write(tmp_path / architecture.name)
    reference = Reference(path, ORIGINAL_POSITIONS if architecture.name in LONGROPE else None)
    prompts = {f"r{n}": prompt_of(length, n) for n, length in enumerate((700, 252, 124, 60))}
    caplog.set_level(logging.INFO, "services.instance.engine")
    rig = EngineRig(path, local_blocks=10, lenders=(5, 5), workspace=2)
    for name, prompt in prompts.items():  # before it runs: one that begins alone might end before the others need room
        rig.submit(name, prompt, 80, logprobs=5, prompt_logprobs=3)
    with rig:
        rig.wait(*prompts)
        for name, prompt in prompts.items():
            check(rig, name, reference, prompt, 80)
        rig.check_nothing_held()
    assert "request preempted" in caplog.messages


@pytest.mark.parametrize(("architecture", "reason"), REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_what_cannot_be_exact_is_refused_by_name_and_reason(architecture: Architecture, reason: str, tmp_path: Path):
    path = architecture.write(tmp_path / architecture.name)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        probe(load_model(path, "float32", None), kernels.load("cpu"), 64, "float32")
    assert architecture.name.split("-")[0] in str(refused.value).lower()
