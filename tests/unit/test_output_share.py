"""How long outputs are expected to become."""

from services.core.output_share import OutputShare


def test_outputs_are_expected_to_be_as_long_as_those_before():
    outputs = OutputShare()
    assert outputs.to_come(0, 4000) == 0, "nothing is known yet"
    outputs.ended(400, 4000)
    assert outputs.to_come(0, 1000) == 100
    assert outputs.to_come(30, 1000) == 70
    assert outputs.to_come(500, 1000) == 0, "longer than expected already"


def test_a_prompt_that_was_only_scored_says_nothing_of_outputs():
    outputs = OutputShare()
    outputs.ended(0, 0)
    assert outputs.to_come(0, 1000) == 0
    outputs.ended(500, 1000)
    outputs.ended(0, 0)
    assert outputs.to_come(0, 1000) == 500


def test_what_has_changed_is_learned():
    outputs = OutputShare()
    outputs.ended(10, 1000)
    for _ in range(100):
        outputs.ended(300, 300)
    assert outputs.to_come(0, 1000) > 980
