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
