from services.core.sequence import Request, SamplingParams, Sequence, SequenceState
from services.instance.scheduler import Scheduler


def sequence(name: str, tokens: int, arrival: float, computed: int = 0) -> Sequence:
    made = Sequence(Request(name, tuple(range(tokens)), tokens, SamplingParams(0.0, 0, 10), arrival, 1))
    made.computed = computed
    return made


def running(scheduler: Scheduler, *sequences: Sequence) -> None:
    for item in sequences:
        scheduler.add(item)
        scheduler.admit(item)


def always(_: Sequence, __: int) -> bool:
    return True


def names(batch) -> list[tuple[str, int]]:
    return [(item.sequence.request_id, item.count) for item in batch]


def test_decodes_come_first_and_prefill_fills_the_rest_of_the_budget():
    scheduler = Scheduler(8, 100)
    running(scheduler, sequence("prefill", 500, 1), sequence("a", 10, 2, 9), sequence("b", 10, 3, 9))
    assert names(scheduler.schedule(always)) == [("a", 1), ("b", 1), ("prefill", 98)]


def test_a_chunk_beside_decoding_requests_is_as_small_as_their_pace_needs():
    scheduler = Scheduler(8, 512, mixed_step_s=0.2)
    prompt, decoding = sequence("prompt", 10_000, 1), sequence("decoding", 10, 2, 9)
    running(scheduler, prompt)
    alone = scheduler.schedule(always)
    assert names(alone) == [("prompt", 512)]
    scheduler.took(alone, 1.024)  # 2 ms a token
    running(scheduler, decoding)
    assert names(scheduler.schedule(always)) == [("decoding", 1), ("prompt", 100)]
    scheduler.took(scheduler.schedule(always)[:1], 0.1)  # decoding alone
    assert names(scheduler.schedule(always)) == [("decoding", 1), ("prompt", 50)]
    scheduler.took(scheduler.schedule(always)[:1], 0.3)  # longer than a step should take
    assert names(scheduler.schedule(always)) == [("decoding", 1), ("prompt", 150)], "not more than twice as long"


def test_a_prompt_goes_on_however_slow_steps_are_and_alone_it_is_not_held_back():
    scheduler = Scheduler(8, 512, mixed_step_s=0.2)
    prompt, decoding = sequence("prompt", 10_000, 1), sequence("decoding", 10, 2, 9)
    running(scheduler, prompt)
    scheduler.took(scheduler.schedule(always), 500.0)
    assert names(scheduler.schedule(always)) == [("prompt", 512)]
    running(scheduler, decoding)
    assert names(scheduler.schedule(always)) == [("decoding", 1), ("prompt", 16)]


def test_steps_that_become_cheaper_allow_larger_chunks_again():
    scheduler = Scheduler(8, 512, mixed_step_s=0.2)
    running(scheduler, sequence("prompt", 10_000, 1), sequence("decoding", 10, 2, 9))
    batch = scheduler.schedule(always)
    assert names(batch) == [("decoding", 1), ("prompt", 511)], "nothing is known yet"
    scheduler.took(batch, 5.11)
    assert names(scheduler.schedule(always))[1] == ("prompt", 20)
    for _ in range(12):
        batch = scheduler.schedule(always)
        scheduler.took(batch, 0.001 * batch[1].count)
    assert 190 <= scheduler.schedule(always)[1].count <= 200


def test_only_a_chunk_that_reaches_the_end_is_sampled():
    scheduler = Scheduler(8, 64)
    running(scheduler, sequence("p", 100, 1))
    first = scheduler.schedule(always)[0]
    assert not first.samples
    first.sequence.computed += first.count
    second = scheduler.schedule(always)[0]
    assert second.count == 36
    assert second.samples


def test_a_chunk_shrinks_to_the_blocks_there_are():
    scheduler = Scheduler(8, 256)
    running(scheduler, sequence("p", 1000, 1))
    assert names(scheduler.schedule(lambda _, tokens: tokens <= 64)) == [("p", 64)]
    assert scheduler.schedule(lambda *_: False) == []


def test_the_oldest_waiting_request_is_reserved_first_whatever_the_order_of_arrival_here():
    scheduler = Scheduler(2, 100)
    for item in (sequence("young", 5, 9), sequence("old", 5, 1), sequence("middle", 5, 4)):
        scheduler.add(item)
    first = scheduler.next_to_reserve(8)
    assert first is not None
    assert first.request_id == "old"
    first.state = SequenceState.RESERVING
    second = scheduler.next_to_reserve(8)
    assert second is not None
    assert second.request_id == "middle"
    second.state = SequenceState.RESERVING
    assert scheduler.next_to_reserve(8) is None, "only two may run"


def test_a_preempted_sequence_waits_at_its_age_and_begins_anew():
    scheduler = Scheduler(2, 100)
    old, young = sequence("old", 5, 1, 4), sequence("young", 5, 2, 4)
    running(scheduler, young, old)
    assert [s.request_id for s in scheduler.running] == ["old", "young"]
    scheduler.preempt(young)
    assert young.computed == 0
    assert scheduler.next_to_reserve(8) is young


def test_whoever_has_least_to_compute_anew_is_cheapest_to_preempt_but_never_the_oldest():
    scheduler = Scheduler(8, 100)
    oldest = sequence("oldest", 10, 1, 2)
    running(scheduler, oldest)
    assert scheduler.cheapest_to_preempt() is oldest
    running(scheduler, sequence("far", 100, 2, 90), sequence("near", 100, 3, 20), sequence("equal", 100, 4, 20))
    assert scheduler.cheapest_to_preempt().request_id == "equal"


def test_it_says_whether_somebody_who_could_decode_lacks_blocks():
    scheduler = Scheduler(2, 100)
    running(scheduler, sequence("a", 10, 1, 9), sequence("b", 10, 2, 9))
    assert names(scheduler.schedule(lambda s, _: s.request_id == "a")) == [("a", 1)]
    assert scheduler.lacks_blocks
    assert len(scheduler.schedule(always)) == 2
    assert not scheduler.lacks_blocks


def test_who_waits_for_the_budget_does_not_lack_blocks():
    scheduler = Scheduler(2, 1)
    running(scheduler, sequence("a", 10, 1, 9), sequence("b", 10, 2, 9))
    assert names(scheduler.schedule(always)) == [("a", 1)]
    assert not scheduler.lacks_blocks
