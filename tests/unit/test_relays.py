"""Who sends heartbeats directly, and by way of whom the others do."""

from __future__ import annotations

from collections import Counter

from services.gmanager.relays import EXPECTED_S, SHUNNED_S, Relays


class Cluster:
    """Members that do as they are told: where there is a relay for them, they go there."""

    def __init__(self, direct: int, per_relay: int) -> None:
        self.unknown: set[str] = set()
        self.relays = Relays(direct, per_relay, lambda name: None if name in self.unknown else f"{name}:1")
        self.now = 0.0
        self.streams: dict[str, tuple[int, str | None]] = {}
        self.opened = 0

    def open(self, member: str, *, comes: bool = True) -> str | None:
        """A direct stream is opened; if there is a relay for the member, it goes there. Answers which one."""
        self.opened += 1
        stream = self.opened
        self.relays.opened(stream, member)
        address = self.relays.elsewhere(member, self.now)
        self.streams[member] = (stream, None)
        if address is None:
            return None
        relay = address.removesuffix(":1")
        self.close(member)
        if comes:
            self.opened += 1
            self.relays.relay_opened(relay, self.opened, member)
            self.streams[member] = (self.opened, relay)
        return relay

    def close(self, member: str) -> None:
        stream, relay = self.streams.pop(member)
        if relay is None:
            self.relays.closed(stream, member)
        else:
            self.relays.relay_closed(relay, stream)


def test_small_clusters_have_no_relays() -> None:
    cluster = Cluster(direct=8, per_relay=4)
    for number in range(4):
        assert cluster.open(f"instance/{number}") is None
        assert cluster.open(f"kvdaemon/{number}") is None
    assert (cluster.relays.direct, cluster.relays.relayed) == (8, 0)


def test_many_are_shared_out_evenly() -> None:
    cluster = Cluster(direct=8, per_relay=10)
    went = Counter(cluster.open(f"{'instance' if number % 3 == 0 else 'kvdaemon'}/{number}") for number in range(40))
    direct = went.pop(None)
    assert direct == cluster.relays.direct == 8
    assert sum(went.values()) == cluster.relays.relayed == 40 - direct
    assert max(went.values()) - min(went.values()) <= 2  # those that came when there were fewer relays


def test_instances_leave_room_for_daemons() -> None:
    cluster = Cluster(direct=8, per_relay=10)
    for number in range(20):
        cluster.open(f"instance/{number}")  # there is no relay yet
    assert cluster.relays.direct == 20
    for number in range(4):
        cluster.open(f"kvdaemon/{number}")
    # With their next heartbeats instances go, until as many are left as there should be.
    for number in range(20):
        member = f"instance/{number}"
        address = cluster.relays.elsewhere(member, cluster.now)
        if address is not None:
            cluster.close(member)
            cluster.opened += 1
            cluster.relays.relay_opened(address.removesuffix(":1"), cluster.opened, member)
    assert cluster.relays.direct == 4 + 4
    assert cluster.relays.relayed == 16


def test_full_relays_take_nobody() -> None:
    cluster = Cluster(direct=2, per_relay=3)
    assert cluster.open("kvdaemon/k") is None
    assert [cluster.open(f"instance/{number}") for number in range(6)] == [None, "k", "k", "k", None, None]
    cluster.close("instance/1")
    assert cluster.open("instance/6") == "k"


def test_who_was_sent_and_does_not_come_is_not_waited_for() -> None:
    cluster = Cluster(direct=2, per_relay=2)
    cluster.open("kvdaemon/k")
    cluster.open("instance/a")
    assert cluster.open("instance/b", comes=False) == "k"
    assert cluster.open("instance/c", comes=False) == "k"
    assert cluster.open("instance/d") is None
    cluster.now += EXPECTED_S + 1
    assert cluster.open("instance/e") == "k"


def test_a_relay_that_failed_is_shunned_for_a_while() -> None:
    cluster = Cluster(direct=4, per_relay=9)
    for member in ("kvdaemon/k", "kvdaemon/l", "instance/a", "instance/b"):
        assert cluster.open(member) is None
    assert cluster.open("instance/c") == "k"
    cluster.close("instance/c")
    cluster.relays.failed("k:1", cluster.now)
    assert {cluster.open(f"instance/{number}") for number in range(4)} == {"l"}
    cluster.now += SHUNNED_S + 1
    assert cluster.open("instance/c") == "k"


def test_a_daemon_that_relays_is_not_sent_away() -> None:
    cluster = Cluster(direct=2, per_relay=9)
    for member in ("kvdaemon/k", "instance/a", "instance/b"):
        cluster.open(member)
    assert cluster.streams["instance/b"][1] == "k"
    assert cluster.open("kvdaemon/l") == "k"
    cluster.close("kvdaemon/l")
    cluster.relays.failed("k:1", cluster.now)  # so it stays; k is one too many then, but it relays
    assert cluster.open("kvdaemon/l") is None
    cluster.now += SHUNNED_S + 1
    assert cluster.relays.elsewhere("kvdaemon/k", cluster.now) is None
    # One that has lost its own stream is no relay any more, and whoever is left there is counted until it is gone.
    cluster.close("kvdaemon/k")
    assert cluster.open("instance/c") == "l"
    for member in [member for member, (_, relay) in cluster.streams.items() if relay is not None]:
        cluster.close(member)
    assert cluster.relays.relayed == 0


def test_nobody_is_sent_to_a_relay_whose_address_is_unknown() -> None:
    cluster = Cluster(direct=2, per_relay=9)
    cluster.unknown.add("k")
    for member in ("kvdaemon/k", "instance/a", "instance/b"):
        assert cluster.open(member) is None


def test_who_relays_is_not_more_than_half_of_those_who_send_directly() -> None:
    """A relay brings messages of its own. Here all daemons send directly, as nobody knew their addresses."""
    cluster = Cluster(direct=6, per_relay=9)
    names = [f"k{number}" for number in range(20)]
    cluster.unknown = set(names)
    assert {cluster.open(f"kvdaemon/{name}") for name in names} == {None}
    cluster.unknown = {"k0"}
    went = [cluster.relays.elsewhere(f"kvdaemon/{name}", cluster.now) for name in reversed(names)]
    assert {address for address in went if address is not None} == {"k1:1", "k2:1", "k3:1"}
    # One that fails gives its place to another.
    cluster.relays.failed("k2:1", cluster.now)
    assert cluster.relays.elsewhere("kvdaemon/k9", cluster.now) == "k4:1"


def test_a_second_stream_of_the_same_member_counts_until_it_ends() -> None:
    relays = Relays(8, 4, lambda name: f"{name}:1")
    relays.opened(1, "kvdaemon/k")
    relays.opened(2, "kvdaemon/k")
    relays.closed(1, "kvdaemon/k")
    assert relays.direct == 1
    relays.closed(2, "kvdaemon/k")
    assert relays.direct == 0
