"""Sessions, and what the ledger keeps of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.blocks import BlockHandle


@dataclass(frozen=True, slots=True)
class Session:
    """The right of one instance to hold blocks; ``mapped``: its process maps the pool's memory."""

    session_id: int
    instance_id: str
    epoch: int
    mapped: bool


@dataclass(slots=True)
class Holder:
    """What a session holds. Closed and without holds it is forgotten, unless a mapping is still out."""

    session: Session
    open: bool = True
    mapping_out: bool = False
    holds: dict[int, int] = field(default_factory=dict)  # block -> how often
    expired: set[BlockHandle] = field(default_factory=set)  # offers that were taken back, and not released yet
