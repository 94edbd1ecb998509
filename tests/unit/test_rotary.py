"""Longrope: the regime of a request is that of its last position, whatever else is in the batch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from architectures import ORIGINAL_POSITIONS, VOCAB_SIZE, served
from engine_rig import EngineRig
from reference import Reference
from transformers import AutoModelForCausalLM

from services.core.sequence import Request, SamplingParams
from services.instance.model import Model, load_model
from services.instance.rotary import RotaryRegimes

LIMIT = ORIGINAL_POSITIONS


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served("phi3").write(tmp_path_factory.mktemp("models") / "phi3")


def request_of(prompt_tokens: int, max_tokens: int) -> Request:
    return Request("r", (0,) * prompt_tokens, prompt_tokens, SamplingParams(0.0, 0, max_tokens), 0.0, 1)


def test_the_last_position_that_is_computed_decides():
    regimes = RotaryRegimes(LIMIT, 2048)
    assert not regimes.is_long(request_of(LIMIT, 1))
    assert regimes.is_long(request_of(LIMIT, 2))
    assert regimes.is_long(request_of(LIMIT + 1, 1))
    assert [regimes.name(request_of(n, 1)) for n in (1, 2 * LIMIT)] == ["short", "long"]
    assert not RotaryRegimes(LIMIT, LIMIT + 1).is_long(request_of(LIMIT, 1000)), "no request becomes longer than that"
    assert not RotaryRegimes(None, 2048).is_long(request_of(2000, 10))
    assert RotaryRegimes(None, 2048).name(request_of(2000, 10)) == "default"


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_rows_of_both_regimes_get_transformers_own_embeddings(name: str, tmp_path: Path):
    path = served(name).write(tmp_path / name)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.rotary_emb
    model = load_model(path, "float32", None)
    x = torch.zeros(1, 1)
    positions = torch.tensor([[3, 4, 5, 0, 1, 700, 701]])
    long = torch.tensor([False, False, False, True, True, True, True])
    short_answer = reference(x, positions[:, :3])
    long_answer = reference(x, positions[:, 3:])
    model.rotary.long_rows = long
    for got, short, beyond in zip(rotary(model)(x, positions), short_answer, long_answer, strict=True):
        torch.testing.assert_close(got, torch.cat([short, beyond], dim=1))
    assert not torch.equal(short_answer[0], reference(x, torch.tensor([[3, 4, 5, LIMIT]]))[0][:, :3])


def rotary(model: Model) -> torch.nn.Module:
    module = model.module.model.rotary_emb  # type: ignore[union-attr]
    assert isinstance(module, torch.nn.Module)
    return module


def test_regimes_do_not_share_cached_blocks(phi3: Path):
    prompt = random.Random(2).choices(range(VOCAB_SIZE), k=200)
    reference = Reference(phi3, LIMIT)
    with EngineRig(phi3) as rig:
        for name, count in (("short", 20), ("long", 100), ("short again", 20), ("long again", 100)):
            rig.submit(name, prompt, count)
            rig.wait(name)
            reference.generate(prompt, count).check_tokens(rig.tokens(name))
        cached = [rig.cached_tokens(name) for name in ("short", "long", "short again", "long again")]
        assert cached == [0, 0, 192, 192]
        rig.check_nothing_held()


def test_the_older_way_to_write_it_is_understood(phi3: Path, tmp_path: Path):
    """rope_scaling with a "type", and the limit beside it."""
    old = tmp_path / "old"
    old.mkdir()
    for file in phi3.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    config = json.loads((phi3 / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["original_max_position_embeddings"] = LIMIT
    factors = {name: rope[name] for name in ("short_factor", "long_factor")}
    config["rope_scaling"] = {"type": "longrope", **factors}
    (old / "config.json").write_text(json.dumps(config))
    assert load_model(old, "float32", None).rotary.name(request_of(LIMIT, 2)) == "long"
