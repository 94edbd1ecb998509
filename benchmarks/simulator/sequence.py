"""A request under way: the engine's own ``Sequence``, of which the scheduler sees what it always sees."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.core.sequence import Request, SamplingParams, Sequence


class TokenCount(list[int]):
    """Tokens of which nothing but the number matters."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __len__(self) -> int:
        return self.number


@dataclass(slots=True, eq=False)
class SimulatedSequence(Sequence):
    """Blocks are counted, not named.

    Attributes:
        output: tokens that it is going to generate; nobody but the simulator knows.
        remaining: of them, those still to come.
        length: of ``tokens``, the same object.
        local: blocks of its instance's own pool.
        remote: blocks on other instances' daemons, by instance; all > 0. Those of a prompt hold its beginning.
        away: the sum of ``remote``.
        first_token_at: None before.
    """

    output: int = 0
    remaining: int = 0
    length: TokenCount = field(default_factory=lambda: TokenCount(0))
    local: int = 0
    remote: dict[int, int] = field(default_factory=dict)
    away: int = 0
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = self.length = TokenCount(self.request.prompt_tokens)
        self.remaining = self.output

    @property
    def held(self) -> int:
        """Blocks, wherever they lie."""
        return self.local + self.away

    @property
    def longest(self) -> int:
        """What it may grow to, as its instance knows."""
        return self.request.prompt_tokens + self.request.sampling.max_tokens

    def put(self, instance: int, blocks: int) -> None:
        """``blocks`` more (negative: fewer) on another instance's daemon."""
        there = self.remote.get(instance, 0) + blocks
        assert there >= 0
        self.away += blocks
        if there:
            self.remote[instance] = there
        else:
            self.remote.pop(instance, None)

    def resting(self, block_tokens: int) -> int:
        """Its sealed blocks in the own pool."""
        return max(0, min(self.local, self.computed // block_tokens - self.away))

    def away_tokens(self, block_tokens: int) -> int:
        """Computed tokens that lie on other daemons: a prompt's first ones."""
        return min(self.computed, self.away * block_tokens)


def make_sequence(number: int, prompt: int, output: int, max_tokens: int, arrival_time: float) -> SimulatedSequence:
    """``number`` is unique."""
    request = Request(f"r{number:07}", (), prompt, SamplingParams(0.0, 0, max_tokens), arrival_time, 0)
    return SimulatedSequence(request, output=output)
