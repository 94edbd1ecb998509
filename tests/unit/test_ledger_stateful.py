"""The ledger under arbitrary sequences of calls, against a model that is too simple to be wrong."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from fuzzing import cases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core.blocks import BlockHandle, PoolGeometry
from services.core.errors import GeometryMismatchError, InfiniteLLMError, SessionRevokedError
from services.rmanager.ledger import Ledger

BLOCKS = 6
GEOMETRIES = [PoolGeometry(layers, 1, 4, 2, "float32") for layers in (1, 2)]
KEYS = [number.to_bytes(16, "little") for number in range(3)]
INSTANCES = ["a", "b", "c"]
RARELY = st.sampled_from([False] * 4 + [True])  # what ends sessions, so that they live long enough to hold something


@dataclass
class Client:
    """What a client believes to have: every hold it was told of and has not given up."""

    session_id: int
    instance: str
    mapped: bool
    open: bool = True
    mapping_out: bool = False
    holds: Counter[BlockHandle] = field(default_factory=Counter)
    expired: set[BlockHandle] = field(default_factory=set)  # offers taken back, and not released yet

    @property
    def writes(self) -> bool:
        """Its process may still touch the blocks it believes to hold."""
        return self.open or self.mapping_out


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ledger = Ledger(BLOCKS * GEOMETRIES[0].block_bytes, itertools.count(1).__next__, lambda: self.now)
        self.offers: list[tuple[Client, set[BlockHandle]]] = []  # those of living sessions; all last one second
        self.reading: list[BlockHandle] = []
        self.clients: list[Client] = []
        self.epochs: dict[str, int] = {}
        self.sealed: dict[BlockHandle, bytes] = {}  # of the present format; some may have been evicted
        self.given: set[tuple[BlockHandle, int]] = set()  # every (handle, owner) of a reservation
        self.writing: tuple[Client, BlockHandle, bool] | None = None  # on behalf of the client
        self.geometry: PoolGeometry | None = None

    def some(self, data: st.DataObject) -> Client:
        """Mostly a client whose session is open."""
        live = [client for client in self.clients if client.open]
        return data.draw(st.sampled_from(live * 4 + self.clients))

    def some_handle(self, data: st.DataObject, client: Client) -> BlockHandle:
        """Mostly one the client holds, sometimes anybody's."""
        mine = [handle for handle, count in client.holds.items() if count]
        anybody = BlockHandle(data.draw(st.integers(0, BLOCKS)), data.draw(st.integers(0, 5)))
        return data.draw(st.sampled_from([*mine, *mine, *mine, anybody]))

    @initialize(mapped=st.booleans())
    def two_sessions(self, mapped: bool) -> None:
        """Every run begins with somebody there and, half of the time, with a mapping out."""
        self.open_session("a", 0, True, GEOMETRIES[0], mapped=True)
        self.open_session("b", 0, True, GEOMETRIES[0], mapped=False)
        if mapped:
            self.ledger.begin_mapping(self.clients[0].session_id)
            self.clients[0].mapping_out = True

    @rule(
        instance=st.sampled_from(INSTANCES),
        newer=st.sampled_from([0, 0, 1, -1]),
        rarely=RARELY,
        geometry=st.sampled_from([GEOMETRIES[0]] * 9 + [GEOMETRIES[1]]),
        mapped=st.booleans(),
    )
    def open_session(self, instance: str, newer: int, rarely: bool, geometry: PoolGeometry, mapped: bool) -> None:
        if not rarely:
            return
        epoch = self.epochs.get(instance, 1) + newer
        try:
            session = self.ledger.open_session(instance, epoch, geometry, mapped)
        except SessionRevokedError:
            assert newer < 0
            assert instance in self.epochs
            return
        except GeometryMismatchError:
            assert geometry != self.geometry
            self._end(client for client in self.clients if client.instance == instance)
            return
        self._end(client for client in self.clients if client.instance == instance)
        if geometry != self.geometry:
            assert not any(client.writes and client.holds.total() for client in self.clients)
            self._end(self.clients)
            self.geometry = geometry
            self.sealed.clear()
        self.epochs[instance] = epoch
        self.clients.append(Client(session.session_id, instance, mapped))

    def _end(self, clients: object) -> None:
        for client in list(clients):
            client.open = False
            assert self.ledger.revoked(client.session_id)
        self.forget_offers()

    def forget_offers(self) -> None:
        self.offers = [(client, blocks) for client, blocks in self.offers if client.open and blocks]

    def offered(self, client: Client, handle: BlockHandle) -> bool:
        return any(owner is client and handle in blocks for owner, blocks in self.offers)

    def withdraw(self, client: Client, handle: BlockHandle) -> None:
        for owner, blocks in self.offers:
            if owner is client:
                blocks.discard(handle)
        self.forget_offers()

    @rule(data=st.data())
    def map_pool(self, data: st.DataObject) -> None:
        client = self.some(data)
        try:
            self.ledger.begin_mapping(client.session_id)
        except InfiniteLLMError:
            assert not (client.open and client.mapped)
        else:
            client.mapping_out = True

    @rule(data=st.data(), rarely=RARELY)
    def close(self, data: st.DataObject, rarely: bool) -> None:
        if not rarely:
            return
        client = self.some(data)
        self.ledger.close_session(client.session_id)
        client.open = False
        self.forget_offers()

    @precondition(lambda self: any(client.mapping_out for client in self.clients))
    @rule(data=st.data(), rarely=RARELY)
    def hang_up(self, data: st.DataObject, rarely: bool) -> None:
        if not rarely:
            return
        client = data.draw(st.sampled_from([client for client in self.clients if client.mapping_out]))
        self.ledger.hang_up(client.session_id)
        client.open = client.mapping_out = False
        self.forget_offers()

    @rule(
        data=st.data(),
        most=st.integers(1, BLOCKS),
        least=st.integers(0, 2),
        kind=st.sampled_from(["workspace", "request", "offer"]),
    )
    def reserve(self, data: st.DataObject, most: int, least: int, kind: str) -> None:
        client = self.some(data)
        before = self.ledger.stats()
        try:
            handles = self.ledger.reserve(client.session_id, most, least, kind == "workspace", kind == "offer")
        except InfiniteLLMError:
            assert not client.open or least > most or before.available < least
            assert self.ledger.stats() == before
            return
        assert len(handles) == min(most, before.available)
        for handle in handles:
            assert not any(other.writes and other.holds[handle] for other in self.clients)
            assert handle.generation > max(
                (old.generation for old, _ in self.given if old.block == handle.block), default=-1
            )
            self.given.add((handle, client.session_id))
            client.holds[handle] += 1
            for old in [old for old in self.sealed if old.block == handle.block]:
                del self.sealed[old]
        if kind == "offer":
            self.offers.append((client, set(handles)))

    @precondition(lambda self: self.offers)
    @rule()
    def time_passes(self) -> None:
        """All offers that were not used meanwhile are over; a block under a write is none any more."""
        self.now += 1.0
        for client, blocks in self.offers:
            client.holds -= Counter(blocks)
            client.expired |= blocks
        self.offers = []

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def seal(self, data: st.DataObject, key: bytes) -> None:
        client = self.some(data)
        handle = self.some_handle(data, client)
        already = handle in self.sealed
        before = self.ledger.stats()
        try:
            (holder,) = self.ledger.seal(client.session_id, [handle], [key])
        except InfiniteLLMError:
            assert self.ledger.stats() == before
            busy = self.writing is not None and self.writing[1] == handle
            assert not client.open or not client.holds[handle] or busy or (already and self.sealed[handle] != key)
            return
        assert client.open
        assert client.holds[handle]
        self.withdraw(client, handle)
        if holder != handle:
            assert self.sealed[holder] == key
            client.holds[holder] += 1
        elif already:
            assert self.sealed[handle] == key
        else:
            assert key not in self.sealed.values()
            self.sealed[handle] = key

    @rule(data=st.data(), keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def attach(self, data: st.DataObject, keys: list[bytes]) -> None:
        client = self.some(data)
        try:
            found = self.ledger.attach(client.session_id, keys)
        except SessionRevokedError:
            assert not client.open
            return
        by_key = {key: handle for handle, key in self.sealed.items()}
        assert found == [(index, by_key[key]) for index, key in enumerate(keys) if key in by_key]
        for _, handle in found:
            client.holds[handle] += 1

    @rule(data=st.data(), number=st.integers(1, 3))
    def release(self, data: st.DataObject, number: int) -> None:
        client = self.some(data)
        handles = [self.some_handle(data, client) for _ in range(number)]
        handles += data.draw(st.sampled_from([[], *([handle] for handle in client.expired)]))
        before = self.ledger.stats()
        held = Counter(handle for handle in handles if handle not in client.expired)
        try:
            self.ledger.release(client.session_id, handles)
        except InfiniteLLMError:
            assert not client.open or held - client.holds
            assert self.ledger.stats() == before
            return
        assert client.open
        assert not held - client.holds
        client.holds -= held
        client.expired -= set(handles)
        for handle in held:
            if not client.holds[handle]:
                self.withdraw(client, handle)

    @precondition(lambda self: self.writing is None)
    @rule(data=st.data(), on_behalf=st.booleans())
    def begin_write(self, data: st.DataObject, on_behalf: bool) -> None:
        client = self.some(data)
        handle = self.some_handle(data, client)
        offered = self.offered(client, handle)
        try:
            self.ledger.begin_write(client.session_id, handle, on_behalf)
        except InfiniteLLMError:
            refused = on_behalf and not offered
            assert not client.open or not client.holds[handle] or handle in self.sealed or refused
            return
        assert offered or not on_behalf
        self.withdraw(client, handle)
        self.writing = (client, handle, on_behalf)

    @precondition(lambda self: self.writing is not None)
    @rule(key=st.sampled_from(KEYS))
    def finish_write(self, key: bytes) -> None:
        assert self.writing is not None
        client, handle, on_behalf = self.writing
        self.writing = None
        try:
            holder = self.ledger.finish_write(client.session_id, handle, None if on_behalf else key)
        except InfiniteLLMError:
            assert not client.open or not client.holds[handle]
            return
        assert client.open
        if on_behalf:
            assert holder == handle
        elif holder == handle:
            assert key not in self.sealed.values()
            self.sealed[handle] = key
        else:
            assert self.sealed[holder] == key
            client.holds[holder] += 1
            client.holds -= Counter([handle])

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def begin_read(self, data: st.DataObject, key: bytes) -> None:
        client = self.some(data)
        handle = self.some_handle(data, client)
        try:
            self.ledger.begin_read(client.session_id, handle, key)
        except InfiniteLLMError:
            assert not client.open or not client.holds[handle] or self.sealed.get(handle) != key
            return
        self.reading.append(handle)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def finish_read(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.reading))
        self.reading.remove(handle)
        self.ledger.finish_read(handle.block)

    @invariant()
    def sound(self) -> None:
        assert self.ledger.check_integrity() == []
        stats = self.ledger.stats()
        held = {handle for client in self.clients if client.writes for handle in client.holds if client.holds[handle]}
        assert self.sealed.keys() >= set(self.reading), "what is read is never evicted"
        in_use = (held | set(self.reading)) & self.sealed.keys()
        reserved = held - self.sealed.keys()
        if self.writing is not None:
            reserved.add(self.writing[1])
        assert stats.in_use == len(in_use)
        assert stats.workspace + stats.reserved == len(reserved)
        assert stats.cached == len(self.sealed) - len(in_use)
        assert stats.free == stats.total - stats.in_use - stats.workspace - stats.reserved - stats.cached
        for client in self.clients:
            assert self.ledger.revoked(client.session_id) != client.open
            for handle in self.sealed:
                readable = self.ledger.readable(client.session_id, handle)
                assert readable == (client.open and client.holds[handle] > 0)


LedgerMachine.TestCase.settings = cases(100, stateful_step_count=60)
TestLedgerStateful = LedgerMachine.TestCase
