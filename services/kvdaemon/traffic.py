"""How many bytes a daemon exchanges with each instance on the data plane."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class InstanceTraffic:
    """Of all connections in one instance's name over one transport; bytes of whole messages.

    Attributes:
        connections: that are open; when the last one has ended, nobody tells of the instance any more.
    """

    instance_id: str
    transport: str
    connections: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class Traffic:
    """Written by the worker thread, read by any."""

    def __init__(self) -> None:
        self._by_instance: dict[tuple[str, str], InstanceTraffic] = {}

    def begin(self, instance_id: str, transport: str) -> InstanceTraffic:
        """A connection is there; whoever holds the answer adds to it."""
        traffic = self._by_instance.setdefault((instance_id, transport), InstanceTraffic(instance_id, transport))
        traffic.connections += 1
        return traffic

    def end(self, traffic: InstanceTraffic) -> None:
        """The connection is gone."""
        traffic.connections -= 1
        if not traffic.connections:
            del self._by_instance[traffic.instance_id, traffic.transport]

    def all(self) -> tuple[InstanceTraffic, ...]:
        """Of every instance that is connected."""
        return tuple(self._by_instance.values())
