"""How long outputs are expected to become."""

from services.core.output_share import OutputShare


def test_outputs_are_expected_to_be_as_long_as_those_before():
    lengths = OutputShare()
    assert lengths.to_come(0, 4000) == 0, "nothing is known yet"
    lengths.ended(400, 4000)
    assert lengths.to_come(0, 1000) == 100
    assert lengths.to_come(30, 1000) == 70
    assert lengths.to_come(500, 1000) == 0, "longer than expected already"


def test_a_prompt_that_was_only_scored_says_nothing_of_outputs():
    lengths = OutputShare()
    lengths.ended(0, 0)
    assert lengths.to_come(0, 1000) == 0
    lengths.ended(500, 1000)
    lengths.ended(0, 0)
    assert lengths.to_come(0, 1000) == 500


def test_what_has_changed_is_learned():
    lengths = OutputShare()
    lengths.ended(10, 1000)
    for _ in range(100):
        lengths.ended(300, 300)
    assert lengths.to_come(0, 1000) > 980
