"""The ring of the shm transport against a queue, and against a peer that writes anything anywhere."""

import mmap
import random
from collections import deque

import numpy as np
import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import PeerLostError
from services.dataplane.shm_ring import WRAP, RingLayout, RingReader, RingWriter, record_bytes
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Limits


def new_ring(limits, ring=0, hello_bytes=0):
    layout = RingLayout(limits, hello_bytes)
    memory = mmap.mmap(-1, layout.total_bytes)
    return memory, layout, RingWriter(memory, layout, ring), RingReader(memory, layout, ring)


@st.composite
def limits_and_steps(draw):
    longest = draw(st.integers(1, 700))
    window = longest + draw(st.integers(0, 2000))
    step = st.one_of(
        st.tuples(st.just("send"), st.integers(0, longest)),
        st.tuples(st.just("release"), st.integers(0, 1 << 30)),
        st.tuples(st.just("read"), st.just(0)),
    )
    return Limits(longest, window), draw(st.lists(step, max_size=200))


@cases(150)
@given(limits_and_steps())
def test_the_ring_is_a_queue(case):
    """Whatever is sent within the window arrives, in order and intact, however releases are mixed in."""
    limits, steps = case
    _, layout, writer, reader = new_ring(limits)
    sent, held, window = deque(), [], deque()
    for number, (step, value) in enumerate(steps):
        charged = sum(charge for charge, _ in window)
        if step == "send" and (not window or charged + max(value, SMALLEST_CHARGE_BYTES) <= limits.window_bytes):
            content = random.Random(number).randbytes(value)
            writer.write([content[: value // 2], content[value // 2 :]], value)
            window.append([max(value, SMALLEST_CHARGE_BYTES), False])
            sent.append((content, window[-1]))
        elif step == "read":
            while (message := reader.read()) is not None:
                content, entry = sent.popleft()
                assert bytes(message.data) == content
                held.append((message, content, entry))
            assert not sent
            assert not reader.pending()
        elif step == "release" and held:
            message, content, entry = held.pop(value % len(held))
            assert bytes(message.data) == content  # nothing sent since has touched it
            message.release()
            entry[1] = True
            while window and window[0][1]:
                window.popleft()
        assert layout.capacity % 64 == 0


@cases(150)
@given(st.integers(0, 1 << 30), st.booleans())
def test_garbage_in_shared_memory_is_a_lost_peer(seed, plausible):
    """No counter or length that a peer writes leads outside the ring or to another error."""
    choose = random.Random(seed)
    limits = Limits(500, 2000)
    memory, layout, writer, reader = new_ring(limits)
    words = memoryview(memory).cast("Q")
    held = []
    try:
        for _ in range(100):
            action = choose.randrange(4)
            if action == 0:
                writer.write([bytes(choose.randrange(500))], 0 if choose.random() < 0.1 else 499)
            elif action == 1:
                while (message := reader.read()) is not None:
                    assert len(message.data) <= limits.max_message_bytes
                    held.append(message)
            elif action == 2 and held:
                held.pop(choose.randrange(len(held))).release()
            else:
                small = choose.randrange(0, 2 * layout.capacity, 64 if plausible else 1)
                value = choose.choice((small, WRAP, choose.randrange(1 << 64)))
                where = choose.choice((0, 16, 32, choose.randrange(len(words))))
                words[where] = value
    except (PeerLostError, ValueError):  # ValueError: our own write above with a wrong size
        pass


@pytest.mark.parametrize(
    "head", [63, 64 + 1, 1 << 40, WRAP, 64 * 1000], ids=["odd", "odd2", "far", "largest", "beyond the ring"]
)
def test_an_impossible_head(head):
    memory, layout, _, reader = new_ring(Limits(100, 1000))
    assert layout.capacity < 64 * 1000
    memoryview(memory).cast("Q")[0] = head
    with pytest.raises(PeerLostError, match="impossible counter"):
        reader.read()


def test_an_impossible_tail():
    memory, layout, writer, _ = new_ring(Limits(100, 1000))
    memoryview(memory).cast("Q")[16] = 1 << 50
    content = bytes(100)
    for _ in range(layout.capacity // record_bytes(100)):
        writer.write([content], 100)
    with pytest.raises(PeerLostError, match="impossible counter"):
        writer.write([content], 100)


@pytest.mark.parametrize("length", [101, 1 << 20, WRAP - 1, WRAP])
def test_an_impossible_length(length):
    memory, layout, writer, reader = new_ring(Limits(100, 1000))
    writer.write([b"first"], 5)
    memoryview(memory)[layout.data_at(0) :][:8].cast("Q")[0] = length
    with pytest.raises(PeerLostError, match="impossible length"):
        reader.read()


def test_messages_are_aligned_to_64_bytes():
    _, _, writer, reader = new_ring(Limits(100, 1000), ring=1, hello_bytes=77)
    for size in (1, 64, 65, 100) * 20:
        writer.write([bytes(size)], size)
        message = reader.read()
        assert np.frombuffer(message.data, dtype=np.uint8).ctypes.data % 64 == 0
        message.release()


def test_records_waste_less_than_the_layout_allows_for():
    for size in range(3000):
        charge = max(size, SMALLEST_CHARGE_BYTES)
        whole = -(-charge // SMALLEST_CHARGE_BYTES) * record_bytes(SMALLEST_CHARGE_BYTES)
        assert record_bytes(size) <= whole
        assert record_bytes(size) * SMALLEST_CHARGE_BYTES <= record_bytes(SMALLEST_CHARGE_BYTES) * charge


def test_one_doorbell_per_sleep():
    _, _, writer, reader = new_ring(Limits(100, 1000))
    assert not writer.write([b"a"], 1)  # awake from the beginning
    assert not reader.fall_asleep()  # something to read
    reader.read().release()
    assert reader.fall_asleep()
    assert writer.write([b"b"], 1)
    assert not writer.write([b"c"], 1)
    reader.wake_up()
    assert not writer.write([b"d"], 1)
    for _ in range(3):
        reader.read().release()
    assert reader.fall_asleep()
    assert writer.write([b"e"], 1)
