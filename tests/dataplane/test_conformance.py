"""What every backend of the data plane does. Each test is one promise of ``services/dataplane/transport.py``."""

import hashlib
import random
import threading
from array import array
from collections import deque

import pytest

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Accepted, Connected, Limits, Lost, Received

LIMITS = Limits(max_message_bytes=64 << 10, window_bytes=256 << 10)
ROUND_TRIPS = 1500
PROMISED = 50  # messages of at most 5000 bytes, which the window holds on their way


@pytest.fixture
def pair(net):
    """Two stations and the two ends of one connection between them."""
    client, server = net.station("client"), net.station("server")
    near, far = net.link(client, server, LIMITS)
    return client, server, near, far


def test_hello_is_delivered(net):
    client, server = net.station("client"), net.station("server")
    for hello in (b"", b"x", bytes(range(256)) * 256):
        net.link(client, server, hello=hello)
        assert server.of(Accepted)[-1].hello == hello
        assert server.of(Accepted)[-1].connection.limits == LIMITS


def test_connections_that_cannot_be(net):
    client, server = net.station("client"), net.station("server")
    with pytest.raises(PeerLostError):
        client.transport.connect(net.backend.nowhere(), b"", LIMITS)
    with pytest.raises(ConfigError):
        client.transport.connect("carrier-pigeon:home", b"", LIMITS)
    with pytest.raises(ValueError, match="hello"):
        client.transport.connect(server.address, bytes((64 << 10) + 1), LIMITS)
    net.settle()
    assert client.events == server.events == []


def test_listening_twice_answers_the_same_address(net):
    server = net.station("server")
    assert server.transport.listen() == server.address
    assert server.address.startswith(f"{server.transport.scheme}:")


def test_messages_arrive_in_order(net, pair):
    _, server, near, far = pair
    numbers = []
    for i in range(3000):
        near.send([i.to_bytes(4, "little")])
        if i % 100 == 99:
            net.arrive(server, far, 100)
            numbers += [int.from_bytes(data, "little") for data in server.take(far)]
    assert numbers == list(range(3000))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 55, 56, 57, 63, 64, 65, 4096, LIMITS.max_message_bytes])
def test_message_sizes(net, pair, size):
    client, server, near, far = pair
    content = random.Random(size).randbytes(size)
    for sender, station, receiver in ((near, server, far), (far, client, near)):
        sender.send([content])
        net.pump(lambda station=station: station.messages())
        assert station.take(receiver) == [content]


def test_parts_are_joined_and_may_be_reused(net, pair):
    _, server, near, far = pair
    numbers = array("d", [1.5, -2.5])
    reused = bytearray(b"reused")
    near.send([b"", b"bytes", reused, memoryview(b"xviewx")[1:-1], b"", memoryview(numbers)])
    reused[:] = b"......"
    near.send([])
    net.arrive(server, far, 2)
    assert server.take(far) == [b"bytesreusedview" + numbers.tobytes(), b""]


def test_a_message_too_long_is_refused_and_the_connection_stays(net, pair):
    _, server, near, far = pair
    with pytest.raises(ValueError, match=str(LIMITS.max_message_bytes)):
        near.send([bytes(LIMITS.max_message_bytes), b"x"])
    near.send([b"after"])
    net.arrive(server, far, 1)
    assert server.take(far) == [b"after"]


def test_messages_sent_before_the_peer_accepts_arrive(net):
    client, server = net.station("client"), net.station("server")
    near = client.transport.connect(server.address, b"early", LIMITS)
    near.send([b"one"])
    near.send([b"two"])
    for _ in range(3):
        assert client.poll(0.001) == []  # not connected before the other side's poll
    net.pump(lambda: len(server.messages()) == 2 and client.of(Connected))
    assert isinstance(server.events[0], Accepted)
    assert server.take() == [b"one", b"two"]
    assert len(client.of(Connected, near)) == 1


def test_a_peer_that_closes_after_sending_is_still_heard(net):
    client, server = net.station("client"), net.station("server")
    near = client.transport.connect(server.address, b"", LIMITS)
    near.send([b"last words"])
    near.close()
    net.pump(lambda: server.of(Lost))
    assert [type(event) for event in server.events] == [Accepted, Received, Lost]
    assert server.take() == [b"last words"]


def test_many_peers(net):
    server = net.station("server")
    clients = [net.station(f"client{i}") for i in range(20)]
    ends = [net.link(client, server, hello=str(i).encode())[0] for i, client in enumerate(clients)]
    names = {event.connection: event.hello for event in server.of(Accepted)}
    for turn in range(5):
        for i, end in enumerate(ends):
            end.send([f"{i}:{turn}".encode()])
        net.pump(lambda: len(server.messages()) == len(ends))
        for event in server.of(Received):
            event.connection.send([names[event.connection], b" got ", event.message.data])
        server.take()
        net.pump(lambda: all(client.messages() for client in clients))
        for i, client in enumerate(clients):
            assert client.take() == [f"{i} got {i}:{turn}".encode()]


def test_a_peer_that_does_not_poll_holds_up_nobody(net):
    server, idle, busy = (net.station(name) for name in ("server", "idle", "busy"))
    _, to_idle = net.link(idle, server)
    near, far = net.link(busy, server)
    for i in range(200):
        if i < 100:
            to_idle.send([bytes(2000)])
        near.send([bytes(1000)])
        net.pump(lambda: server.messages(far), only=[server, busy])
        server.take(far)
    net.pump(lambda: len(idle.messages()) == 100)


def test_both_ways_at_once(net, pair):
    client, server, near, far = pair
    sent = [random.Random(i).randbytes(i * 37 % 5000) for i in range(400)]
    at_server, at_client = [], []
    for i, content in enumerate(sent):
        near.send([content])
        far.send([content[::-1]])

        def all_there(count=i + 1):
            at_server.extend(server.take(far))
            at_client.extend(client.take(near))
            return len(at_server) == len(at_client) == count

        for station in (client, server):
            station.poll()
        all_there()
        if i % PROMISED == PROMISED - 1:
            net.pump(all_there)
    assert at_server == sent
    assert at_client == [content[::-1] for content in sent]


def test_large_volume_with_releases_out_of_order(net, pair):
    """The sender counts what it may send; the receiver checks contents late and releases in any order."""
    _, server, near, far = pair
    choose = random.Random(1)
    noise = choose.randbytes(1 << 20)
    sent, got = hashlib.blake2b(), hashlib.blake2b()
    window = deque()  # [charge, released], in order of arrival
    charged, volume, held = 0, 0, []
    while volume < 24 << 20 or held:
        size = choose.choice((choose.randrange(300), choose.randrange(LIMITS.max_message_bytes + 1)))
        charge = max(size, SMALLEST_CHARGE_BYTES)
        if volume < 24 << 20 and charged + charge <= LIMITS.window_bytes:
            start = choose.randrange(len(noise) - size)
            near.send([memoryview(noise)[start : start + size // 3], noise[start + size // 3 : start + size]])
            sent.update(noise[start : start + size])
            window.append([charge, False])
            held.append((window[-1], None))
            charged, volume = charged + charge, volume + size
            continue
        waiting = [entry for entry, message in held if message is None]
        net.arrive(server, far, len(waiting))
        held = [(entry, message) for entry, message in held if message is not None]
        for entry, message in zip(waiting, server.messages(far), strict=True):
            got.update(message.data)
            held.append((entry, message))
        server.events.clear()
        choose.shuffle(held)
        for _ in range(len(held) // 2 + 1):
            entry, message = held.pop()
            message.release()
            entry[1] = True
        while window and window[0][1]:
            charged -= window.popleft()[0]
    assert got.digest() == sent.digest()


@pytest.mark.parametrize("size", [0, 57, 1000, LIMITS.max_message_bytes])
def test_the_window_is_kept_and_enforced(net, pair, size):
    client, server, near, far = pair
    promised = LIMITS.window_bytes // max(size, SMALLEST_CHARGE_BYTES)
    content = bytes(size)
    for turn in range(3):  # the promise holds wherever earlier messages have ended
        for _ in range(promised):
            near.send([content])
        net.arrive(server, far, promised)
        server.take(far)
        for _ in range(turn + 1):
            near.send([b"shift"])
        net.arrive(server, far, turn + 1)
        server.take(far)
    with pytest.raises(PeerLostError):
        net.send_until_lost(client, near, content, 20 * promised)
    net.lost(client, near)
    net.lost(server, far)
    with pytest.raises(PeerLostError):
        near.send([b"x"])
    with pytest.raises(PeerLostError):
        far.send([b"x"])


def test_messages_stay_valid_after_the_peer_is_lost(net, pair):
    client, server, near, far = pair
    near.send([b"kept"])
    net.arrive(server, far, 1)
    client.transport.close()
    net.lost(server, far)
    assert bytes(server.messages(far)[0].data) == b"kept"
    assert server.take(far) == [b"kept"]
    far.close()


def test_close_while_messages_are_held(net, pair):
    client, server, near, far = pair
    for _ in range(3):
        near.send([b"held"])
    far.send([b"unread"])
    net.arrive(server, far, 3)
    messages = server.messages(far)
    messages[1].release()
    near.send([b"not polled"])
    far.close()
    far.close()
    for message in messages:
        assert bytes(message.data) == b""
        message.release()
        message.release()
    net.lost(client, near)
    net.settle()
    assert client.take(near) == [b"unread"]
    assert server.of(Lost) == []
    assert len(server.messages(far)) == 3
    with pytest.raises(PeerLostError):
        far.send([b"x"])


def test_lost_comes_exactly_once_and_last(net, pair):
    client, server, near, far = pair
    near.send([b"before"])
    client.transport.close()
    net.lost(server, far)
    net.settle()
    assert [type(event) for event in server.events if event.connection is far] == [Accepted, Received, Lost]
    assert server.of(Lost, far)[0].reason
    with pytest.raises(PeerLostError):
        far.send([b"x"])
    far.close()
    net.settle()
    assert len(server.of(Lost)) == 1


def test_a_listener_that_ends_before_it_accepts(net):
    client, server = net.station("client"), net.station("server")
    near = client.transport.connect(server.address, b"", LIMITS)
    near.send([b"nobody reads this"])
    server.transport.close()
    net.lost(client, near)
    assert client.of(Connected) == []


def test_reconnection(net):
    client = net.station("client")
    for turn in range(3):
        server = net.station("server")
        near, far = net.link(client, server)
        near.send([b"turn %d" % turn])
        net.pump(lambda server=server, far=far: server.messages(far))
        assert server.take(far) == [b"turn %d" % turn]
        server.transport.close()
        server.transport.close()
        net.lost(client, near)
        with pytest.raises(PeerLostError):
            client.transport.connect(server.address, b"", LIMITS)


def test_connections_of_one_pair_of_transports_are_independent(net, pair):
    client, server, near, far = pair
    near2, far2 = net.link(client, server)
    near.send([b"1"])
    near2.send([b"2"])
    net.pump(lambda: len(server.messages()) == 2)
    assert (server.take(far), server.take(far2)) == ([b"1"], [b"2"])
    near.close()
    net.lost(server, far)
    far2.send([b"still here"])
    net.pump(lambda: client.messages(near2))


def test_a_transport_connects_to_itself(net):
    station = net.station("self")
    near, far = net.link(station, station)
    near.send([b"to me"])
    net.pump(lambda: station.messages(far))
    assert station.take(far) == [b"to me"]


def test_poll_without_events_ends(net, pair):
    client, _, _, _ = pair
    net.settle()
    assert client.poll(0) == []
    assert client.poll(0.01) == []


def test_wake(net, pair):
    client, _, _, _ = pair
    net.settle()
    client.transport.wake()
    client.transport.wake()
    assert client.poll(60) == []  # the next poll returns at once, both calls count as one
    timer = threading.Timer(0.05, client.transport.wake)
    timer.start()
    assert client.poll(60) == []
    timer.join()
    assert client.poll(0.001) == []


def test_wake_and_poll_after_close(net):
    client = net.station("client")
    client.transport.close()
    client.transport.wake()
    assert client.poll(60) == []


def test_two_threads_that_wait_for_each_other(net, pair):
    """No wake-up is lost: every message is answered although both sides sleep most of the time."""
    client, server, near, far = pair
    failures = []
    done = threading.Event()

    def serve():
        answered = 0
        while not done.is_set():  # the last answer may need polls to leave
            events = server.transport.poll(20 if answered < ROUND_TRIPS else 0.01)
            if not events and answered < ROUND_TRIPS:
                failures.append("the server waited in vain")
                return
            for event in events:
                if isinstance(event, Received):
                    far.send([event.message.data])
                    event.message.release()
                    answered += 1

    thread = threading.Thread(target=serve)
    thread.start()
    for i in range(ROUND_TRIPS):
        near.send([i.to_bytes(4, "little")])
        answer = None
        while answer is None:
            events = client.transport.poll(20)
            assert events, "the client waited in vain"
            for event in events:
                if isinstance(event, Received):
                    answer = int.from_bytes(event.message.data, "little")
                    event.message.release()
        assert answer == i
    done.set()
    thread.join(20)
    assert not failures
