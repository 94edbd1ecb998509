"""Ids of events: what a gateway sends is what another one reads, and anything else is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequestError
from services.gateway.position import START, EventId, Place, Position

PLACES = st.builds(Place, st.builds(Position, st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1)), st.integers(0, 9))


@cases(200)
@given(st.lists(PLACES, max_size=128))
def test_an_id_is_read_as_it_was_written(places: list[Place]) -> None:
    event_id = EventId(tuple(places))
    assert EventId.parse(str(event_id)) == event_id
    assert event_id.of_choices(len(places)) == tuple(places)


@cases(300)
@given(st.text(max_size=30) | st.text("0123456789abcdef-.", max_size=30))
def test_anything_else_is_refused(text: str) -> None:
    with suppress(InvalidRequestError):
        event_id = EventId.parse(text)
        assert EventId.parse(str(event_id)) == event_id


def test_positions_and_choices() -> None:
    assert START.after([1, 2]).after([3]) == START.after([1, 2, 3]) != START.after([3, 2, 1])
    one = Place(START.after([7]), 1)
    assert str(EventId((one, Place()))) == f"1-{one.position.checksum:08x}-1.0-00000000"
    assert EventId().of_choices(2) == (Place(), Place())
    with pytest.raises(InvalidRequestError):
        EventId((one,)).of_choices(2)
