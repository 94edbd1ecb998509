"""Where a new request goes: to room that the planner told of, else to the least loaded instance."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from services.core.placement import AdmissionHint
from services.gateway.cluster import InstanceView
from services.gateway.instance_client import InstanceClient
from services.gateway.requests import GenerationRequest
from services.gateway.router import Router


class ReadyClient(InstanceClient):
    """Connected to nobody, and takes requests all the same."""

    async def _run(self) -> None:
        self._outgoing, self._ready = asyncio.Queue(), True


def view(name: str, hint: AdmissionHint | None = None) -> InstanceView:
    return InstanceView(name, f"{name}:1", 10_000, f"k{name}", 0, 0, 10, 0.0, hint)


def request(name: str, tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_ids=tuple(range(tokens)),
        max_tokens=10,
        temperature=0.0,
        seed=1,
        stop_token_ids=(),
        logprobs=0,
        progress=False,
        arrival_time=0.0,
    )


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.gateway.router.InstanceClient", ReadyClient)
        self.router = Router("gateway", 5.0)

    async def tell(self, *views: InstanceView) -> None:
        self.router.set_instances(views)
        await asyncio.sleep(0)

    async def place(self, name: str, tokens: int, avoid: Collection[str] = (), near: str = "") -> str:
        return (await self.router.place(request(name, tokens), (), 1.0, avoid, near)).instance_id


def test_room_comes_before_load(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = Rig(monkeypatch)
        await rig.tell(view("a"), view("b", AdmissionHint(1000, 1.0)))
        assert await rig.place("r0", 600) == "b"
        # What was sent there since counts; 400 are left.
        assert await rig.place("r1", 300) == "b"
        assert await rig.place("r2", 300) == "a"  # nobody has room that is told of: the least loaded
        await rig.tell(view("a"), view("b", AdmissionHint(1000, 1.0)))  # no news
        assert await rig.place("r3", 300) == "a"
        await rig.tell(view("a"), view("b", AdmissionHint(990, 1.0)))
        assert await rig.place("r4", 900) == "b"
        assert await rig.place("r5", 5000) == "a"
        await rig.router.close()

    asyncio.run(scenario())


def test_among_those_with_room_the_least_loaded_then_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = Rig(monkeypatch)
        await rig.tell(view("a", AdmissionHint(5000, 1.0)), view("b", AdmissionHint(5000, 9.0)))
        assert [await rig.place(f"r{number}", 100) for number in range(4)] == ["b", "a", "b", "a"]
        await rig.router.close()

    asyncio.run(scenario())


def test_without_a_planner_the_least_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = Rig(monkeypatch)
        await rig.tell(view("a"), view("b"))
        assert [await rig.place(f"r{number}", 100) for number in range(3)] == ["a", "b", "a"]
        await rig.router.close()

    asyncio.run(scenario())


def test_another_choice_goes_where_the_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        rig = Rig(monkeypatch)
        await rig.tell(view("a"), view("b", AdmissionHint(5000, 1.0)))
        assert await rig.place("r0", 100, near="a") == "a"
        assert await rig.place("r1", 100, avoid=["a"], near="a") == "b"
        assert await rig.place("r2", 100, near="gone") == "b"
        await rig.router.close()

    asyncio.run(scenario())
