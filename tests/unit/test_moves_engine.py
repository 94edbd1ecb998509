"""Blocks of a request move while it decodes: the tokens stay those of transformers, and nothing is left behind."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest
from engine_rig import EngineRig
from random_llama import VOCAB_SIZE, write_random_llama
from reference import Reference

from services.core.placement import MoveEnd

LAYERS = 4  # of random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_random_llama(path, logit_scale=4.0)
    return path


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def placement(rig: EngineRig, name: str = "r") -> dict[str, int]:
    return dict(rig.snapshot.placement).get(name, {})


def decode(rig: EngineRig, tokens: int, name: str = "r") -> None:
    """Until so many more tokens have come."""
    wanted = len(rig.tokens(name)) + tokens
    rig.wait_until(lambda: len(rig.tokens(name)) >= wanted)


def move(rig: EngineRig, source: str, destination: str, blocks: int) -> None:
    """Moves blocks of "r", which all arrive."""
    end = rig.moved("r", source, destination, blocks)
    assert (end.end, end.moved_blocks) == (MoveEnd.DONE, blocks)


def test_blocks_go_round_while_the_request_decodes(model: Path, reference: Reference) -> None:
    prompt = prompt_of(64 * 8, 1)
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        rig.submit("r", prompt, 500)
        decode(rig, 3)
        for _ in range(3):
            move(rig, "local", "lender-0", 6)
            decode(rig, 3)
            move(rig, "lender-0", "lender-1", 6)
            decode(rig, 3)
            move(rig, "lender-1", "lender-0", 2)
            rig.local.evict()
            move(rig, "lender-1", "local", 4)
            decode(rig, 3)
            rig.local.evict()
            move(rig, "lender-0", "local", 2)
            rig.lenders[0].evict()
            rig.lenders[1].evict()
        assert "r" not in rig.ended(), "the request should have been decoding all the while"
        rig.wait("r")
        reference.generate(prompt, 500).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_content_that_lies_at_the_destination_is_not_copied(model: Path, reference: Reference) -> None:
    prompt = prompt_of(64 * 8, 2)
    with EngineRig(model, local_blocks=40, lenders=(20,)) as rig:
        rig.submit("r", prompt, 300)
        decode(rig, 3)
        move(rig, "local", "lender-0", 6)
        copies: list[object] = []
        rig.local.worker._fill_block = lambda *copy: copies.append(copy)  # type: ignore[method-assign]
        move(rig, "lender-0", "local", 6)  # cached here since they left
        move(rig, "local", "lender-0", 6)  # and there
        assert not copies
        rig.wait("r")
        reference.generate(prompt, 300).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_every_step_sees_one_place_of_every_block(model: Path) -> None:
    """All layers of a step ask the same daemons for the same blocks, and no two daemons for the same one."""
    with EngineRig(model, local_blocks=40, lenders=(20, 20), move_bytes_per_s=1.0) as rig:
        rig.submit("r", prompt_of(64 * 10, 3), 400)
        decode(rig, 3)
        for source, destination in (("local", "lender-0"), ("lender-0", "lender-1"), ("lender-1", "lender-0")):
            move(rig, source, destination, 8)
        rig.abort("r")
        rig.check_nothing_held()
        steps: dict[int, dict[str, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
        for daemon in rig.lenders:
            for query in daemon.queries:
                steps[query.step][daemon.name].append(query.positions)
        shared = 0
        for by_daemon in steps.values():
            for plans in by_daemon.values():
                assert plans == [plans[0]] * LAYERS
            positions = [position for plans in by_daemon.values() for position in plans[0]]
            assert len(set(positions)) == len(positions)
            shared += len(by_daemon) == 2
        assert shared > 5, "some steps should have run while a move was half done"


def test_open_blocks_and_blocks_on_their_way_stay(model: Path) -> None:
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        rig.submit("r", prompt_of(64 * 5 + 10, 4), 200)
        decode(rig, 3)
        first = rig.move("r", "local", "lender-0", 100)
        second = rig.moved("r", "local", "lender-1", 100)
        assert (second.end, second.moved_blocks) == (MoveEnd.NOTHING_TO_MOVE, 0)
        rig.wait_until(lambda: first in rig.move_ends)
        assert (rig.move_ends[first].end, rig.move_ends[first].moved_blocks) == (MoveEnd.DONE, 5)
        decode(rig, 3)
        rig.abort("r")
        rig.check_nothing_held()


def test_refusals(model: Path) -> None:
    with EngineRig(model, local_blocks=40, lenders=(4,)) as rig:
        assert rig.moved("nobody", "local", "lender-0", 3).end is MoveEnd.UNKNOWN_REQUEST
        rig.submit("r", prompt_of(64 * 14, 5), 400)
        decode(rig, 3)
        assert rig.moved("r", "lender-0", "local", 3).end is MoveEnd.NOTHING_TO_MOVE
        ids = [rig.move("r", "local", "lender-0", 1) for _ in range(40)]
        rig.wait_until(lambda: set(ids) <= rig.move_ends.keys())
        assert MoveEnd.TOO_MANY_MOVES in {rig.move_ends[move_id].end for move_id in ids}
        assert sum(rig.move_ends[move_id].moved_blocks for move_id in ids) <= 4
        rig.abort("r")
        rig.check_nothing_held()


def test_less_room_than_wanted_takes_what_there_is(model: Path, reference: Reference) -> None:
    prompt = prompt_of(64 * 8, 6)
    with EngineRig(model, local_blocks=40, lenders=(3,)) as rig:
        rig.submit("r", prompt, 200)
        decode(rig, 3)
        assert rig.moved("r", "local", "lender-0", 8).moved_blocks == 3
        assert rig.moved("r", "local", "lender-0", 8).moved_blocks == 0
        rig.wait_until(lambda: placement(rig).get("lender-0") == 3)
        rig.wait("r")
        reference.generate(prompt, 200).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_a_pool_that_is_short_itself_takes_nothing_home(model: Path) -> None:
    with EngineRig(model, local_blocks=12, lenders=(20,)) as rig:
        rig.submit("r", prompt_of(64 * 12, 7), 300)
        decode(rig, 3)
        rig.wait_until(lambda: rig.stats()[0].available == 0)
        assert rig.moved("r", "lender-0", "local", 3).moved_blocks == 0
        rig.abort("r")
        rig.check_nothing_held()


@pytest.mark.parametrize("lost", ["source", "destination"])
def test_a_daemon_that_is_lost_in_the_middle(model: Path, reference: Reference, lost: str) -> None:
    prompt = prompt_of(64 * 14, 8)
    with EngineRig(model, local_blocks=40, lenders=(20, 20), move_bytes_per_s=1.0) as rig:
        rig.submit("r", prompt, 200)
        decode(rig, 3)
        move(rig, "local", "lender-0", 12)
        move_id = rig.move("r", "lender-0", "lender-1", 12)
        rig.wait_until(lambda: any(query.positions for query in rig.lenders[1].queries))
        rig.lenders[0 if lost == "source" else 1].revoke()
        rig.wait_until(lambda: move_id in rig.move_ends)
        end = rig.move_ends[move_id]
        assert end.end is (MoveEnd.SOURCE_LOST if lost == "source" else MoveEnd.DESTINATION_LOST)
        assert 0 < end.moved_blocks < 12
        rig.wait("r")
        reference.generate(prompt, 200).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_a_request_that_ends_in_the_middle(model: Path) -> None:
    with EngineRig(model, local_blocks=40, lenders=(20, 20), move_bytes_per_s=1.0) as rig:
        for number, source in enumerate(("local", "lender-0")):
            rig.submit("r", prompt_of(64 * 14, 9 + number), 300)
            decode(rig, 3)
            if source != "local":
                move(rig, "local", source, 12)
            rig.lenders[1].queries.clear()
            move_id = rig.move("r", source, "lender-1", 12)
            rig.wait_until(lambda: any(query.positions for query in rig.lenders[1].queries))
            rig.abort("r")
            rig.check_nothing_held()
            assert rig.move_ends[move_id].end is MoveEnd.REQUEST_ENDED
            assert 0 < rig.move_ends[move_id].moved_blocks < 12


def test_room_that_is_not_used_in_time_is_given_back(model: Path, reference: Reference) -> None:
    prompt = prompt_of(64 * 8, 11)
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        rig.submit("r", prompt, 1200)
        decode(rig, 3)
        move(rig, "local", "lender-0", 2)
        rig.use_within_s = -1.0
        for source in ("local", "lender-0"):
            end = rig.moved("r", source, "lender-1", 2)
            assert (end.end, end.moved_blocks) == (MoveEnd.EXPIRED, 0)
            assert rig.stats()[2].reserved == 0
        rig.wait("r")
        reference.generate(prompt, 1200).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_room_that_the_destination_has_taken_back(model: Path, reference: Reference) -> None:
    """The instance believes that it has time left; the destination refuses the block, and the request stays."""
    prompt = prompt_of(64 * 8, 12)
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        rig.submit("r", prompt, 300)
        decode(rig, 3)
        move(rig, "local", "lender-0", 5)
        rig.offer_ttl_s, rig.use_within_s = 1e-6, 1000.0
        end = rig.moved("r", "lender-0", "lender-1", 5)
        assert (end.end, end.moved_blocks) == (MoveEnd.COPY_FAILED, 0)
        assert rig.stats()[2].reserved == 0
        rig.offer_ttl_s = 30.0
        move(rig, "lender-0", "lender-1", 5)
        rig.wait("r")
        reference.generate(prompt, 300).check_tokens(rig.tokens("r"))
        rig.check_nothing_held()


def test_blocks_that_two_requests_share(model: Path, reference: Reference) -> None:
    common = prompt_of(64 * 6, 13)
    prompts = {"r": common + prompt_of(40, 14), "s": common + prompt_of(90, 15)}
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        for name, prompt in prompts.items():
            rig.submit(name, prompt, 250)
            decode(rig, 2, name)
        move(rig, "local", "lender-0", 6)
        rig.wait_until(lambda: placement(rig, "r").get("lender-0") == 6 and "lender-0" not in placement(rig, "s"))
        assert rig.moved("s", "local", "lender-0", 4).moved_blocks == 4
        assert rig.moved("s", "lender-0", "lender-1", 2).moved_blocks == 2
        decode(rig, 2, "r")
        decode(rig, 2, "s")
        rig.wait("r", "s")
        for name, prompt in prompts.items():
            reference.generate(prompt, 250).check_tokens(rig.tokens(name))
        rig.check_nothing_held()


def test_two_requests_move_the_same_blocks_at_once(model: Path, reference: Reference) -> None:
    """Both find the destination empty and copy; the second to arrive adopts the first one's blocks."""
    common = prompt_of(64 * 8, 16)
    prompts = {"r": common + prompt_of(40, 17), "s": common + prompt_of(90, 18)}
    with EngineRig(model, local_blocks=40, lenders=(20, 20)) as rig:
        for name, prompt in prompts.items():
            rig.submit(name, prompt, 250)
            decode(rig, 2, name)
        for source, destination in (("local", "lender-0"), ("lender-0", "lender-1")):
            ids = [rig.move(name, source, destination, 8) for name in prompts]
            rig.wait_until(lambda ids=ids: set(ids) <= rig.move_ends.keys())
            assert [rig.move_ends[move_id].moved_blocks for move_id in ids] == [8, 8]
        with rig.lenders[1].shared as ledger:
            stats = ledger.stats()
        assert (stats.in_use, stats.reserved) == (8, 0)
        rig.wait("r", "s")
        for name, prompt in prompts.items():
            reference.generate(prompt, 250).check_tokens(rig.tokens(name))
        rig.check_nothing_held()


def test_blocks_of_a_move_go_one_by_one_or_a_few_between_two_steps(model: Path, reference: Reference) -> None:
    prompt, blocks, tokens = prompt_of(64 * 18, 9), 16, {}
    for rate in (1.0, 1e12):
        with EngineRig(model, local_blocks=40, lenders=(20,), move_bytes_per_s=rate) as rig:
            rig.submit("r", prompt, 400)
            decode(rig, 3)
            before = len(rig.tokens("r"))
            move(rig, "local", "lender-0", blocks)
            tokens[rate] = len(rig.tokens("r")) - before
            rig.wait("r")
            reference.generate(prompt, 400).check_tokens(rig.tokens("r"))
    assert tokens[1.0] >= blocks - 2
    assert blocks / 4 - 2 <= tokens[1e12] < tokens[1.0]


@pytest.mark.parametrize("seed", range(4))
def test_anything_at_any_moment(model: Path, reference: Reference, seed: int) -> None:
    """Requests on scarce memory, moves between random places, lenders lost, caches evicted, requests aborted."""
    choose = random.Random(seed)
    prompts = {f"r{n}": prompt_of(choose.randrange(30, 600), 1000 * seed + n) for n in range(6)}
    aborted: set[str] = set()
    places = ["local", "lender-0", "lender-1"]
    rate = 1.0 if seed % 2 else 1e12  # of moves: a block between two steps, or some
    with EngineRig(model, local_blocks=20, lenders=(14, 10), max_num_seqs=3, move_bytes_per_s=rate) as rig:
        for name, prompt in prompts.items():
            rig.submit(name, prompt, 120)
        asked = 0
        while not set(prompts) - aborted <= rig.ended():
            seen = len(rig.outputs)
            rig.wait_until(lambda seen=seen: len(rig.outputs) > seen or choose.random() < 0.05)
            if len(rig.move_ends) > asked - 6:  # a few at once
                running = [name for name, _ in rig.snapshot.placement] or list(prompts)
                rig.move(choose.choice(running), *choose.sample(places, 2), choose.randrange(1, 6))
                asked += 1
            if choose.random() < 0.01:
                choose.choice(rig.lenders).revoke()
            if choose.random() < 0.05:
                choose.choice([rig.local, *rig.lenders]).evict()
            if choose.random() < 0.01 and len(aborted) < 2:
                name = choose.choice(list(prompts))
                aborted.add(name)
                rig.abort(name)
        for name in prompts.keys() - aborted:
            reference.generate(prompts[name], 120).check_tokens(rig.tokens(name))
        rig.check_nothing_held()
        rig.wait_until(lambda: len(rig.move_ends) == asked)
        assert sum(end.moved_blocks for end in rig.move_ends.values()) > 10
