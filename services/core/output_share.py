"""How much of ``max_tokens`` outputs make use of, from those that ended lately: what an instance admits by.

The planner, which asks how much longer a request that runs already will be, goes by the lengths themselves.
"""

from __future__ import annotations

_WEIGHT = 1 / 16  # of the output that ended last


class OutputShare:
    """Outputs as a share of ``max_tokens``, which most of them do not use up.

    Before any has ended they are taken to be nothing: whoever counts on outputs goes by prompts alone until then.
    """

    def __init__(self) -> None:
        self._share: float | None = None

    def ended(self, generated: int, max_tokens: int) -> None:
        """Takes in an output that ended by itself; ``max_tokens`` 0: there was to be none, which tells nothing."""
        if max_tokens:
            share = min(1.0, generated / max_tokens)
            before = share if self._share is None else self._share
            self._share = before + _WEIGHT * (share - before)

    def to_come(self, generated: int, max_tokens: int) -> int:
        """Tokens that are expected beyond those that have been generated."""
        return max(0, int((self._share or 0.0) * max_tokens) - generated)
