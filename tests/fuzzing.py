"""How many cases hypothesis tries, and which.

In ``make test`` they are the same ones each time, so that its verdict depends on the code alone. ``make fuzz`` draws
new ones, FUZZ_TIMES as many, and hypothesis prints how to repeat what it found.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_TIMES = os.environ.get("FUZZ_TIMES")


def cases(number: int, **options: object) -> settings:
    """Settings for a property that ``make test`` tries on so many cases; ``options``: further ones of hypothesis."""
    return settings(
        max_examples=number * int(_TIMES or 1),
        derandomize=_TIMES is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        **options,
    )
