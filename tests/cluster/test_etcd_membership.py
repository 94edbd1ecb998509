"""Membership and election on a real etcd that restarts, hangs and loses leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.core.errors import ConfigError, SessionRevokedError
from services.runtime.election import Election, Leader
from services.runtime.etcd import EtcdClient
from services.runtime.membership import Member, Membership

DEADLINE_S = 90.0
KEY = "/infinite-llm/test/members/kvdaemon/kv-0"


@asynccontextmanager
async def client_of(endpoint: str) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([endpoint], timeout_s=1.0)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        await client.close()


class Seen:
    """The latest of an endless iterator, in the background."""

    def __init__(self, source: AsyncIterator[object]) -> None:
        self.all: list[object] = []
        self._task = asyncio.create_task(self._follow(source))

    async def _follow(self, source: AsyncIterator[object]) -> None:
        async for item in source:
            self.all.append(item)

    async def until(self, wanted: object) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not self.all or self.all[-1] != wanted:
                assert not self._task.done(), self._task.exception()
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def test_members_come_and_go(etcd_process) -> None:
    kv = Member("kvdaemon", "kv-0", "127.0.0.1:1000")
    inst = Member("instance", "i-0", "127.0.0.1:1001", model="m", max_model_len=100, local_kvdaemon_id="kv-0", epoch=5)

    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            membership = Membership(etcd, "test")
            daemons, instances = Seen(membership.watch("kvdaemon")), Seen(membership.watch("instance"))
            await daemons.until({})
            first = await membership.register(kv)
            second = await membership.register(inst)
            await daemons.until({"kv-0": kv})
            await instances.until({"i-0": inst})
            assert await membership.list("instance", timeout_s=5) == {"i-0": inst}
            # An entry that this version cannot read hides none of the others.
            await etcd.put(KEY.replace("kv-0", "kv-1"), b'{"shape": "round"}')
            assert await membership.list("kvdaemon", timeout_s=5) == {"kv-0": kv}
            await first.close()
            await daemons.until({})
            await second.close()
            await instances.until({})
            await daemons.stop()
            await instances.stop()

    asyncio.run(scenario())


def test_the_later_epoch_keeps_the_entry(etcd_process, caplog) -> None:
    old = Member("kvdaemon", "kv-0", "127.0.0.1:1000", epoch=1)
    new = Member("kvdaemon", "kv-0", "127.0.0.1:2000", epoch=2)

    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            membership = Membership(etcd, "test")
            first = await membership.register(old)
            second = await membership.register(new)
            third = await membership.register(old)
            assert await membership.list("kvdaemon", timeout_s=5) == {"kv-0": new}
            await third.close()
            await first.close()
            assert await membership.list("kvdaemon", timeout_s=5) == {"kv-0": new}
            await second.close()
            assert await membership.list("kvdaemon", timeout_s=5) == {}

    asyncio.run(scenario())
    assert "later epoch" in caplog.text


def test_a_lost_lease_is_replaced(etcd_process) -> None:
    member = Member("kvdaemon", "kv-0", "127.0.0.1:1000")

    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            membership = Membership(etcd, "test")
            daemons = Seen(membership.watch("kvdaemon"))
            registration = await membership.register(member, ttl_s=2)
            await daemons.until({"kv-0": member})
            entry = await etcd.get(KEY)
            assert entry is not None
            await etcd.lease_revoke(entry.lease_id)
            await daemons.until({})
            await daemons.until({"kv-0": member})
            await registration.close()
            await daemons.stop()

    asyncio.run(scenario())


def test_membership_survives_a_stopped_etcd(etcd_process) -> None:
    member = Member("kvdaemon", "kv-0", "127.0.0.1:1000")
    late = Member("kvdaemon", "kv-1", "127.0.0.1:1001")

    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            membership = Membership(etcd, "test")
            daemons = Seen(membership.watch("kvdaemon"))
            first = await membership.register(member, ttl_s=2)
            await daemons.until({"kv-0": member})
            etcd_process.pause()
            # Registering while etcd hangs does not raise; it goes on in the background.
            second = await membership.register(late, ttl_s=2)
            await asyncio.sleep(4)
            assert daemons.all[-1] == {"kv-0": member}
            etcd_process.resume()
            await daemons.until({"kv-0": member, "kv-1": late})
            etcd_process.kill()
            etcd_process.start()
            await first.close()
            await daemons.until({"kv-1": late})
            await second.close()
            await daemons.until({})
            await daemons.stop()

    asyncio.run(scenario())


def test_registration_waits_for_an_etcd_that_is_not_there_yet(etcd_process) -> None:
    member = Member("gateway", "gw", "127.0.0.1:1000")

    async def scenario() -> None:
        etcd_process.kill()
        async with client_of(etcd_process.endpoint) as etcd:
            membership = Membership(etcd, "test")
            gateways = Seen(membership.watch("gateway"))
            registration = await membership.register(member)
            assert gateways.all == []
            etcd_process.start()
            await gateways.until({"gw": member})
            await registration.close()
            await gateways.stop()

    asyncio.run(scenario())


def test_member_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="slash"):
        Member("kvdaemon", "a/b", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="kind"):
        Member("daemon", "a", "127.0.0.1:1")  # type: ignore[arg-type]


def test_election_of_two_candidates(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd, client_of(etcd_process.endpoint) as other:
            election, rival = Election(etcd, "test", "planner"), Election(other, "test", "planner")
            observed = Seen(election.observe())
            await observed.until(None)
            first = await election.campaign(b"one", ttl_s=2)
            waiting = asyncio.create_task(rival.campaign(b"two", ttl_s=2))
            await observed.until(Leader(b"one", first.fencing_token))
            await first.proclaim(b"uno")
            await observed.until(Leader(b"uno", first.fencing_token))
            assert not waiting.done()
            await first.resign()
            second = await waiting
            assert second.fencing_token > first.fencing_token
            await observed.until(Leader(b"two", second.fencing_token))
            with pytest.raises(SessionRevokedError):
                await first.proclaim(b"still me")
            # A candidate that withdraws leaves nothing behind.
            withdrawn = asyncio.create_task(election.campaign(b"three", ttl_s=2))
            await asyncio.sleep(0.3)
            withdrawn.cancel()
            await asyncio.wait([withdrawn])
            assert len((await etcd.range("/infinite-llm/test/elections/")).entries) == 1
            await second.resign()
            await observed.until(None)
            await observed.stop()

    asyncio.run(scenario())


def test_a_leader_knows_of_its_loss_while_etcd_hangs(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            election = Election(etcd, "test", "planner")
            first = await election.campaign(b"one", ttl_s=2)
            etcd_process.pause()
            await first.lost.wait()
            with pytest.raises(SessionRevokedError):
                await first.proclaim(b"still me")
            waiting = asyncio.create_task(election.campaign(b"two", ttl_s=2))
            await asyncio.sleep(1)
            assert not waiting.done()
            etcd_process.resume()
            second = await waiting
            assert second.fencing_token > first.fencing_token
            await second.resign()
            await first.resign()

    asyncio.run(scenario())
