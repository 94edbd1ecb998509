"""Who waits, who gives way, and whom an engine calls starving where memory is short."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_rig import EngineRig
from test_engine import model, prompt_of  # noqa: F401  (model is a fixture)

from services.instance.control import PromptDeferred, ReservePrompt
from services.instance.scheduler import Scheduled


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


@pytest.mark.parametrize(
    ("lengths", "spares"),
    [
        pytest.param([100], False, id="alone"),
        pytest.param([600, 100], True, id="a-short-one-beside-an-older-one"),
        pytest.param([100, 600], False, id="only-the-oldest-is-short"),
    ],
)
def test_who_has_somebody_to_give_way_spares_others_memory(model: Path, lengths: list[int], spares: bool):  # noqa: F811
    """Blocks for growth are not asked of those whose own requests wait, if a short request could give way instead."""
    with EngineRig(model, local_blocks=40) as rig:
        for number, length in enumerate(lengths):
            rig.submit(f"r{number}", prompt_of(length, number), 500)
            rig.wait_until(lambda name=f"r{number}": len(rig.tokens(name)) > 3)
        before = len(rig.spared)
        rig.wait_until(lambda: len(rig.spared) > before)
        assert rig.spared[-1] is spares
        for number in range(len(lengths)):
            rig.abort(f"r{number}")


def test_who_is_soon_computed_anew_gives_way_while_others_go_on(model: Path, caplog):  # noqa: F811
    """A block is missing: nobody sits steps out until all are stuck."""
    caplog.set_level("INFO", "services.instance.engine")
    with EngineRig(model, local_blocks=24, workspace=6, max_num_seqs=3) as rig:
        batches = batches_of(rig)
        for number in range(3):
            rig.submit(f"r{number}", prompt_of(60 + 20 * number, number), 600)  # eleven blocks each; there are 18
            rig.wait_until(lambda name=f"r{number}": len(rig.tokens(name)) > 3)
        rig.wait_until(lambda: preempted(caplog))
        assert preempted(caplog)[0] == "r1", "the shortest of those that are not the oldest"
        rig.wait("r0", "r1", "r2")
    fewest = min(decoding for decoding, running in batches if running == 3)
    assert fewest == 3, "with three that run, all three step"


def test_who_is_long_gives_way_only_when_nobody_goes_on(model: Path, caplog):  # noqa: F811
    caplog.set_level("INFO", "services.instance.engine")
    with EngineRig(model, local_blocks=34, workspace=6, max_num_seqs=2) as rig:
        batches = batches_of(rig)
        for number in range(2):
            rig.submit(f"r{number}", prompt_of(600 + 30 * number, number), 500)  # 18 blocks each; there are 28
            rig.wait_until(lambda name=f"r{number}": len(rig.tokens(name)) > 3)
        rig.wait_until(lambda: preempted(caplog))
        sat_out = [decoding for decoding, running in batches if running == 2]
        assert 1 in sat_out, "one went on while the other lacked a block"
        rig.abort("r0")
        rig.abort("r1")


def preempted(caplog) -> list[str]:
    return [record.request_id for record in caplog.records if record.message == "request preempted"]


def batches_of(rig: EngineRig) -> list[tuple[int, int]]:
    """Of every step from now on without a prompt: how many decode, and how many run."""
    batches: list[tuple[int, int]] = []
    step, scheduler = rig.engine._step, rig.engine._scheduler

    def observed(scheduled: list[Scheduled], begun: float) -> None:
        if all(item.count == 1 for item in scheduled):
            batches.append((len(scheduled), sum(sequence.pending == 1 for sequence in scheduler.running)))
        step(scheduled, begun)

    rig.engine._step = observed  # type: ignore[method-assign]
    return batches


def test_a_prompt_is_asked_for_with_what_all_will_want_later(model: Path):  # noqa: F811
    """The peak counts who runs and who joins, and how much of max_tokens outputs made use of before."""
    orders: dict[str, ReservePrompt] = {}
    with EngineRig(model, local_blocks=60) as rig:
        reserve = rig._reserve

        def noted(order: ReservePrompt):
            orders[order.age.request_id] = order
            return reserve(order)

        rig._reserve = noted  # type: ignore[method-assign]
        rig.submit("first", prompt_of(130, 1), 10)
        rig.wait("first")
        first, long = (3, 3), (13, 13)
        assert (orders["first"].expected_blocks, orders["first"].peak_blocks) == first, "nothing is known of outputs"
        rig.submit("long", prompt_of(130, 2), 640)
        rig.wait_until(lambda: rig.tokens("long"))
        assert (orders["long"].expected_blocks, orders["long"].peak_blocks) == long, "all of max_tokens, as the first"
        rig.submit("joins", prompt_of(60, 3), 640)
        rig.wait_until(lambda: rig.tokens("joins"))
        assert orders["joins"].expected_blocks == 11
        assert 13 + 9 <= orders["joins"].peak_blocks <= 13 + 11 + 1, "both at once, give or take an open block"
        rig.abort("long")
        rig.abort("joins")


def test_a_prompt_without_room_is_asked_for_as_soon_as_somebody_ends(model: Path):  # noqa: F811
    with EngineRig(model, local_blocks=12, workspace=6, max_num_seqs=2) as rig:
        rig.submit("runs", prompt_of(64 * 4, 1), 60)
        rig.wait_until(lambda: rig.tokens("runs"))
        rig.submit("waits", prompt_of(64 * 4, 2), 3)
        rig.wait_until(lambda: rig.deferred)
        rig.engine._admission._retry_at = float("inf")  # not by the clock
        rig.wait("runs", "waits")


def test_a_beginning_that_several_share_counts_once(model: Path):  # noqa: F811
    """However many requests hold a system prompt's blocks, they are the same blocks."""
    orders: dict[str, ReservePrompt] = {}
    system = prompt_of(64 * 10, 9)
    with EngineRig(model, local_blocks=40, max_num_seqs=4) as rig:
        reserve = rig._reserve

        def noted(order: ReservePrompt):
            orders[order.age.request_id] = order
            return reserve(order)

        rig._reserve = noted  # type: ignore[method-assign]
        for number in range(4):
            rig.submit(f"r{number}", [*system, *prompt_of(30, number)], 200)
            rig.wait_until(lambda name=f"r{number}": rig.tokens(name))
        assert rig.cached_tokens("r3") == len(system)
        # Nobody has ended, so nobody is expected to grow; 11 blocks of its own prompt, and those of the other three.
        assert 11 + 10 + 3 <= orders["r3"].peak_blocks <= 11 + 10 + 3 * 4
        for number in range(4):
            rig.abort(f"r{number}")
