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
    """What a session holds. Closed and without holds it is forgotten, unless a mapping is still out.

    Attributes:
        workspace: so many of its reserved blocks, if it has as many, belong to the instance and to no request. Which
            ones does not matter, and changes as they fill and others take their place.
        reserved: how many of its blocks are reserved.
    """

    session: Session
    open: bool = True
    mapping_out: bool = False
    workspace: int = 0
    reserved: int = 0
    holds: dict[int, int] = field(default_factory=dict)  # block -> how often
    expired: set[BlockHandle] = field(default_factory=set)  # offers that were taken back, and not released yet
