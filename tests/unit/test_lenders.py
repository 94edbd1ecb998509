from hypothesis import given
from hypothesis import strategies as st

from services.rmanager.lenders import FEW, LEAST, shares


def test_a_short_prompt_has_one_lender_and_a_longer_one_a_few() -> None:
    assert shares(3, [100, 90, 80, 70, 60]) == [3, 0, 0, 0, 0]
    assert shares(8, [100, 100, 100, 100, 100]) == [4, 4, 0, 0, 0]
    assert shares(40, [100, 100, 100, 100, 100, 100]) == [10, 10, 10, 10, 0, 0]


def test_what_few_have_no_room_for_takes_more_of_them() -> None:
    assert shares(60, [10] * 8) == [10] * 6 + [0] * 2
    assert shares(100, [10, 5]) == [10, 5]
    assert shares(5, []) == []


@given(st.integers(1, 2000), st.lists(st.integers(1, 500), max_size=40))
def test_all_that_is_needed_is_asked_of_as_few_as_have_it(blocks: int, free: list[int]) -> None:
    free.sort(reverse=True)
    asked = shares(blocks, free)
    assert sum(asked) == min(blocks, sum(free))
    assert all(0 <= share <= room for share, room in zip(asked, free, strict=True))
    needed = next((n for n in range(len(free) + 1) if sum(free[:n]) >= blocks), len(free))
    assert sum(share > 0 for share in asked) <= max(needed, min(FEW, blocks // LEAST))
