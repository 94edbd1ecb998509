"""Offices of gManagers that are held without an election."""

from __future__ import annotations

from dataclasses import dataclass

from services.gmanager.office import Office
from services.runtime.membership import Member

GMANAGER = Member("gmanager", "g", "127.0.0.1:1", epoch=1)


@dataclass
class PlayedReign:
    """Leadership whose loss the test decides."""

    fencing_token: int = 1
    held: bool = True


def leading(reign: PlayedReign | None = None) -> Office:
    """An office that is held."""
    office = Office(GMANAGER, lambda: None)
    office.elected(reign or PlayedReign())
    return office
