import random

import pytest

from services.gateway.stop_strings import StopStrings


def shown(pieces: list[str], stops: list[str], include: bool = False) -> str:
    text = StopStrings(stops, include)
    out = ""
    for piece in pieces:
        out += text.push(piece)
        if text.found:
            return out
    return out + text.flush()


def expected(whole: str, stops: list[str], include: bool) -> str:
    """The first one in the whole text, of those that are complete first."""
    for end in range(len(whole) + 1):
        ending = [stop for stop in stops if whole[:end].endswith(stop)]
        if ending:
            return whole[:end] if include else whole[: end - max(map(len, ending))]
    return whole


@pytest.mark.parametrize("include", [False, True])
def test_however_it_is_cut_into_pieces(include: bool) -> None:
    draw = random.Random(1)
    found = 0
    for _ in range(3000):
        whole = "".join(draw.choices("ab", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3))]
        pieces = list(whole)  # single characters: which one is complete first is never a question
        assert shown(pieces, stops, include) == expected(whole, stops, include)
        found += expected(whole, stops, include) != whole
    assert found > 1000


def test_the_first_of_several_in_one_piece() -> None:
    assert shown(["xx END yy STOP zz"], ["STOP", "END"]) == "xx "
    assert shown(["xx END yy STOP zz"], ["STOP", "END"], include=True) == "xx END"


def test_nothing_is_held_back_that_cannot_become_one() -> None:
    text = StopStrings(["</s>"])
    assert [text.push(piece) for piece in ("a<", "b", "</", "s", "x")] == ["a", "<b", "", "", "</sx"]
    assert (text.push("</s"), text.flush(), text.found) == ("", "</s", False)


def test_what_does_not_count_yet_is_shown() -> None:
    text = StopStrings(["no"])
    assert text.push("n", counts=False) + text.push("o no", counts=False) == "no no"
    assert (text.push("no"), text.found) == ("", True)


def test_without_stop_strings_everything_passes() -> None:
    text = StopStrings([])
    assert (text.push("abc"), text.flush(), text.found) == ("abc", "", False)
