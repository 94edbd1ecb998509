"""Whom an engine calls starving: a prompt that found no room, and not one that waits for somebody older elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_rig import EngineRig
from test_engine import model, prompt_of  # noqa: F401  (model is a fixture)

from services.instance.control import PromptDeferred, ReservePrompt


@pytest.mark.parametrize("starves", [True, False])
def test_who_waits_for_others_to_be_done_does_not_starve(model: Path, starves: bool):  # noqa: F811
    attempts = []

    def defer(order: ReservePrompt) -> PromptDeferred:
        attempts.append(order.attempt)
        return PromptDeferred(order.age.request_id, order.attempt, starves=starves)

    with EngineRig(model) as rig:
        rig._reserve = defer  # type: ignore[method-assign]
        rig.submit("r", prompt_of(60, 1), 10)
        rig.wait_until(lambda: len(attempts) >= 5 and rig.snapshot.waiting == 1)
        starving = rig.snapshot.oldest_starving
        assert (starving is not None and starving.request_id == "r") if starves else starving is None
        rig.abort("r")
