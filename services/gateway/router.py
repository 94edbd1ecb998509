"""Which instance computes a request.

The router keeps one InstanceClient per instance that the gManager lists. An instance that is no longer listed (its
lease may have been lost while etcd hung) but whose stream is alive keeps its requests and gets no new ones.

Another choice of a request goes where the first one is: the prompt lies in the cache there, and what it needs of that
memory is its own answer. Where the gManager plans, it says which instances have room for more, once their requests have
grown. A request that fits into that room goes there; among those that are equal in that, and where nobody plans, the
least loaded is taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, TypeVar

from services.core.errors import NoInstanceError
from services.core.placement import AdmissionHint
from services.gateway.cluster import InstanceView
from services.gateway.instance_client import Attempt, InstanceClient
from services.gateway.requests import GenerationRequest
from services.runtime.tls import MutualTls

logger = logging.getLogger(__name__)


class Router:
    """Places requests on instances, by this gateway's own bookkeeping of load."""

    def __init__(self, gateway_id: str, stream_timeout_s: float, tls: MutualTls | None = None) -> None:
        self._gateway_id = gateway_id
        self._stream_timeout_s = stream_timeout_s
        self._tls = tls
        self._clients: list[InstanceClient] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    @property
    def ready_instances(self) -> int:
        """Instances with an open stream."""
        return sum(client.ready and not client.retired for client in self._clients)

    @property
    def max_model_len(self) -> int:
        """The longest sequence any listed instance takes; 0 where none says so."""
        return max((client.max_model_len for client in self._clients if not client.retired), default=0)

    def set_instances(self, views: Sequence[InstanceView]) -> None:
        """The instances that the gManager lists now."""
        listed = {(view.instance_id, view.address): view for view in views}
        for client in self._clients:
            view = listed.pop((client.instance_id, client.address), None)
            client.retired = view is None
            if view is not None:
                _update(client, view)
        for view in listed.values():
            client = InstanceClient(
                view.instance_id, view.address, self._gateway_id, self._stream_timeout_s, self._on_change, self._tls
            )
            _update(client, view)
            self._clients.append(client)
        self._on_change()

    async def place(
        self,
        request: GenerationRequest,
        generated: Sequence[int],
        timeout_s: float,
        avoid: Collection[str] = (),
        near: str = "",
    ) -> Attempt:
        """Submits to the best instance, waiting for one where there is none.

        Args:
            generated: tokens that other instances have generated already.
            avoid: ids of instances that are taken only if there is no other.
            near: id of the instance whose cache has the prompt, if one is known.
        Raises: NoInstanceError after ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (client := self._best(request, len(generated), avoid, near)) is None:
                    await self._changed.wait()
        except TimeoutError:
            raise NoInstanceError(
                f"no instance was ready to compute the request within {timeout_s:g} s; try again later"
            ) from None
        return client.submit(request, generated)

    async def close(self) -> None:
        """Ends all streams."""
        clients, self._clients = self._clients, []
        await asyncio.gather(*(client.close() for client in clients), *self._closing)

    def _best(
        self, request: GenerationRequest, generated: int, avoid: Collection[str], near: str
    ) -> InstanceClient | None:
        longest, now = len(request.prompt_ids) + request.max_tokens, len(request.prompt_ids) + generated
        candidates = [
            client
            for client in self._clients
            # 0: the instance does not say how much it takes.
            if client.ready and not client.retired and (not client.max_model_len or client.max_model_len >= longest)
        ]
        return preferred(candidates, now, avoid, near)

    def _on_change(self) -> None:
        """Wakes the waiting, and lets go of instances that are neither listed nor used."""
        self._changed.set()
        self._changed = asyncio.Event()
        for client in [client for client in self._clients if client.retired and not client.in_use]:
            self._clients.remove(client)
            closing = asyncio.create_task(client.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


class Candidate(Protocol):
    """An instance, as far as the choice depends on it; see InstanceClient."""

    @property
    def instance_id(self) -> str: ...
    @property
    def hint(self) -> AdmissionHint | None: ...
    @property
    def room_tokens(self) -> int: ...
    @property
    def outstanding_tokens(self) -> int: ...
    @property
    def outstanding_requests(self) -> int: ...
    @property
    def local_free_blocks(self) -> int: ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


def preferred(
    candidates: Iterable[AnyCandidate], tokens: int, avoid: Collection[str], near: str = ""
) -> AnyCandidate | None:
    """Where a request of ``tokens`` tokens should go, see ``Router.place``. Pure; a simulator asks it as well."""
    return min(
        candidates,
        key=lambda client: (
            client.instance_id in avoid,
            client.instance_id != near,
            client.room_tokens < tokens,
            _load(client),
        ),
        default=None,
    )


def _load(client: Candidate) -> tuple[int, int, float, int, str]:
    """Smaller is better. Prompt tokens first: they are both the work ahead and the memory taken."""
    gain = client.hint.gain if client.hint is not None else 0.0
    return (
        client.outstanding_tokens,
        client.outstanding_requests,
        -gain,
        -client.local_free_blocks,
        client.instance_id,
    )


def _update(client: InstanceClient, view: InstanceView) -> None:
    client.max_model_len = view.max_model_len
    client.local_free_blocks = view.local_free_blocks
    client.take_hint(view.hint)
