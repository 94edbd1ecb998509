"""The gateway's side: which instance a request goes to, by the gateway's own rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.core.placement import AdmissionHint
from services.gateway.router import preferred


@dataclass(slots=True)
class RoutedInstance:
    """What a gateway keeps of one instance, as its ``InstanceClient`` does."""

    instance_id: str
    index: int
    hint: AdmissionHint | None = None
    room_tokens: int = 0
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    local_free_blocks: int = 0

    def take_hint(self, hint: AdmissionHint | None) -> None:
        """What the latest plan says. One that is told again is no news."""
        if hint != self.hint:
            self.hint = hint
            self.room_tokens = 0 if hint is None else hint.room_tokens


class Gateway:
    """Places requests, by its own bookkeeping of load."""

    def __init__(self, names: Sequence[str]) -> None:
        self.instances = [RoutedInstance(name, index) for index, name in enumerate(names)]
        self._placed: dict[str, tuple[RoutedInstance, int]] = {}

    def place(self, request_id: str, tokens: int) -> int:
        """The index of the instance that gets a request."""
        chosen = preferred(self.instances, tokens, ())
        assert chosen is not None
        chosen.outstanding_tokens += tokens
        chosen.outstanding_requests += 1
        chosen.room_tokens -= tokens
        self._placed[request_id] = chosen, tokens
        return chosen.index

    def ended(self, request_id: str) -> None:
        chosen, tokens = self._placed.pop(request_id)
        chosen.outstanding_tokens -= tokens
        chosen.outstanding_requests -= 1
