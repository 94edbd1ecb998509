"""A peer that writes anything anywhere into the shared memory of a connection's rings."""

from __future__ import annotations

import random
from mmap import mmap

from services.core.errors import PeerLostError
from services.dataplane.shm_ring import RingLayout, RingWriter

_COUNTERS = (0, 16, 32, 128, 144, 160)  # words: head, tail and asleep of both rings


class RingScribbler:
    """Sends messages through one ring, and writes over counters and lengths meanwhile.

    Args:
        ring: that it sends through.
        payload_bytes: of a message that fits, behind its header of 64 bytes.
    """

    def __init__(self, choose: random.Random, memory: mmap, layout: RingLayout, ring: int, payload_bytes: int) -> None:
        self._choose = choose
        self._words = memoryview(memory).cast("Q")
        self._writer = RingWriter(memory, layout, ring)
        self._capacity, self._data = layout.capacity, layout.data_at(ring)
        self._payload_bytes = payload_bytes

    def act(self, header: bytes) -> bool:
        """Does one of these; False: it wanted to send, and its own ring was beyond use."""
        choose, size = self._choose, 64 + self._payload_bytes
        match choose.randrange(4):
            case 0 | 1:  # a message that fits
                try:
                    self._writer.write([header, choose.randbytes(self._payload_bytes)], size)
                except PeerLostError:
                    return False
            case 2:  # a counter
                near = choose.choice([0, 64, self._capacity, 1 << 63, choose.randrange(1 << 64)])
                self._words[choose.choice(_COUNTERS)] = near
            case _:  # a word of what it sends
                at = (self._data + 8 * choose.randrange(self._capacity // 8)) // 8
                self._words[at] = choose.choice(
                    [0, 64, size - 1, size, size + 1, 1 << 20, (1 << 64) - 1, choose.randrange(1 << 64)]
                )
        return True
