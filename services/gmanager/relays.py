"""Which heartbeats come to the gManager directly, and which by way of a KV daemon. Pure.

A message costs the gManager many times what its contents do, so beyond some hundreds of processes it takes the
heartbeats of most from relays, each message with those of a whole group. Any daemon that sends its own directly can be
one. Nobody is appointed: who is one too many is sent to the relay with the fewest, and returns if that one fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SHUNNED_S = 30.0  # nobody is sent to a relay for so long after somebody had to leave it
EXPECTED_S = 10.0  # who was sent to a relay and is not there after so long will not come


@dataclass(slots=True)
class _Daemon:
    """One daemon.

    Attributes:
        direct: its own streams to the gManager; it can relay as long as it has one.
        relayed: streams of others that come by way of it.
        named_as: the address that others were told; empty where nobody was.
        expected: members that were sent to it and are not there yet, with the time of that.
    """

    direct: set[int] = field(default_factory=set)
    relayed: set[int] = field(default_factory=set)
    named_as: str = ""
    expected: dict[str, float] = field(default_factory=dict)
    shunned_until: float = -math.inf


class Relays:
    """Who sends directly, and who relays for whom. ``now`` is monotonic seconds; a stream's number is its own.

    Args:
        direct: streams that the gManager wants to have itself, half of them of instances and half of daemons. As many
            daemons relay at most: each brings messages of its own, and all are looked through for one that has room.
        per_relay: streams of one relay at most.
        address_of: of a daemon's control server; None where it is not known.
    """

    def __init__(self, direct: int, per_relay: int, address_of: Callable[[str], str | None]) -> None:
        self._limit = direct
        self._per_relay = per_relay
        self._address_of = address_of
        self._instances: set[int] = set()
        self._daemons: dict[str, _Daemon] = {}
        self._named: dict[str, _Daemon] = {}  # by the address that others were told
        self._direct_daemons = 0

    @property
    def direct(self) -> int:
        """Processes that send directly."""
        return len(self._instances) + self._direct_daemons

    @property
    def relayed(self) -> int:
        """Processes that send by way of a relay."""
        return sum(len(daemon.relayed) for daemon in self._daemons.values())

    def opened(self, stream: int, member: str) -> None:
        """A process sends directly."""
        kind, _, member_id = member.partition("/")
        if kind == "instance":
            self._instances.add(stream)
            return
        daemon = self._daemons.setdefault(member_id, _Daemon())
        self._direct_daemons += not daemon.direct
        daemon.direct.add(stream)

    def closed(self, stream: int, member: str) -> None:
        """It does no longer, on this stream."""
        kind, _, member_id = member.partition("/")
        if kind == "instance":
            self._instances.discard(stream)
            return
        daemon = self._daemons[member_id]
        daemon.direct.discard(stream)
        self._direct_daemons -= not daemon.direct
        self._drop_if_gone(member_id)

    def relay_opened(self, kvdaemon_id: str, stream: int, member: str) -> None:
        """A process sends by way of that daemon."""
        daemon = self._daemons.setdefault(kvdaemon_id, _Daemon())
        daemon.relayed.add(stream)
        daemon.expected.pop(member, None)

    def relay_closed(self, kvdaemon_id: str, stream: int) -> None:
        """It does no longer, on this stream."""
        self._daemons[kvdaemon_id].relayed.discard(stream)
        self._drop_if_gone(kvdaemon_id)

    def failed(self, address: str, now: float) -> None:
        """Somebody could not use the relay at this address."""
        daemon = self._named.get(address)
        if daemon is not None:
            daemon.shunned_until = now + SHUNNED_S

    def elsewhere(self, member: str, now: float) -> str | None:
        """Address of the relay that a process which sends directly should go to; None: it may stay."""
        kind, _, member_id = member.partition("/")
        if kind == "instance":
            if len(self._instances) <= self._limit // 2:
                return None
        elif self._direct_daemons <= self._limit // 2 or self._load(self._daemons[member_id], now):
            return None
        best, fewest = None, self._per_relay
        for daemon, address in itertools.islice(self._able(member_id, now), self._limit // 2):
            load = self._load(daemon, now)
            if load < fewest:
                best, fewest = (daemon, address), load
        if best is None:
            return None
        daemon, address = best
        daemon.expected.pop(member, None)  # whoever was sent last is to be last
        daemon.expected[member] = now
        if daemon.named_as != address:
            self._named.pop(daemon.named_as, None)
            daemon.named_as = address
            self._named[address] = daemon
        return address

    def _able(self, member_id: str, now: float) -> Iterator[tuple[_Daemon, str]]:
        """Daemons that can relay for a process, with their addresses; always in the same order."""
        for kvdaemon_id, daemon in self._daemons.items():
            if daemon.direct and now >= daemon.shunned_until and kvdaemon_id != member_id:
                address = self._address_of(kvdaemon_id)
                if address is not None:
                    yield daemon, address

    @staticmethod
    def _load(daemon: _Daemon, now: float) -> int:
        """Streams that it relays or will relay. Whoever was sent first comes first in ``expected``."""
        while daemon.expected and now - next(iter(daemon.expected.values())) > EXPECTED_S:
            del daemon.expected[next(iter(daemon.expected))]
        return len(daemon.relayed) + len(daemon.expected)

    def _drop_if_gone(self, kvdaemon_id: str) -> None:
        daemon = self._daemons[kvdaemon_id]
        if not daemon.direct and not daemon.relayed:
            self._named.pop(daemon.named_as, None)
            del self._daemons[kvdaemon_id]
