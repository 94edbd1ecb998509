"""What the planner may do, and for how much."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PlannerPolicy:
    """The planner's bounds.

    Attributes:
        stale_s: who has not been heard of for longer is left alone.
        settle_s: a request whose blocks were moved is left alone for this long, and at that very time in any case.
        horizon_tokens: output of each request for which memory is kept: it grows that far before anything else.
        min_gain: a move must gain the cluster at least this share of what one request of the instance it is for gets.
        hide: answers of a daemon that blocks move to may take at most this share of the time of the debtor's local
            attention, beside which they run.
        still_hide: the same for all other answers that a move makes longer, or local attention shorter; more than
            ``hide``, or the first creditor would leave nothing for a second one.
        creditor_share: of a device's time that hosting may take from its own instance.
        lender_share: of a memory-only daemon's time.
        reserve: share of a pool that is never lent.
        home_reserve: share of a pool that stays free when blocks come home; more than ``reserve``, so that blocks do
            not come and go.
        max_debtors: instances that one daemon hosts blocks of.
        move_bytes_per_s, move_window_s: a daemon never has more under way than fits through in that time.
        spread_gain: a move that is for speed alone must raise its instance's throughput by this share.
        spread_reserve: share of a memory-only daemon's pool that is left for those who need room.
        spread_room: an instance with more than this share of its pool to lend is worth more as a creditor.
        payback: a move may last for at most this share of its request's remaining time.
    """

    stale_s: float = 5.0
    settle_s: float = 10.0
    horizon_tokens: int = 128
    min_gain: float = 0.25
    hide: float = 0.8
    still_hide: float = 0.95
    creditor_share: float = 0.2
    lender_share: float = 0.8
    reserve: float = 0.05
    home_reserve: float = 0.15
    max_debtors: int = 8
    move_bytes_per_s: float = 256 * 2**20
    move_window_s: float = 20.0
    spread_gain: float = 0.1
    spread_reserve: float = 0.5
    spread_room: float = 0.5
    payback: float = 0.5

    def __post_init__(self) -> None:
        for name in ("hide", "still_hide", "creditor_share", "lender_share", "payback"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"planner: {name} must be in (0, 1], got {getattr(self, name)}")
        if self.hide > self.still_hide:
            raise ConfigError(f"planner: hide ({self.hide}) must not be greater than still_hide ({self.still_hide})")
        if not 0 <= self.reserve <= self.home_reserve < 1:
            raise ConfigError(
                f"planner: 0 <= reserve <= home_reserve < 1 is needed, got {self.reserve} and {self.home_reserve}"
            )
        for name in ("min_gain", "spread_gain"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"planner: {name} must be greater than 0, got {getattr(self, name)}")
        for name in ("spread_reserve", "spread_room"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"planner: {name} must be in [0, 1], got {getattr(self, name)}")
        if min(self.stale_s, self.move_bytes_per_s, self.move_window_s) <= 0 or self.max_debtors < 1:
            raise ConfigError("planner: stale_s, max_debtors, move_bytes_per_s and move_window_s must be positive")
        if self.settle_s < 0 or self.horizon_tokens < 0:
            raise ConfigError("planner: settle_s and horizon_tokens must not be negative")
