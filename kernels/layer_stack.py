"""Several decoder layers with their attention as one call, where ``LayerOps.stack`` has such."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kernels.interface import AttentionKernels, AttentionPlan, LayerParams
from kernels.layer_ops import LayerAngles, LayerOp

if TYPE_CHECKING:
    from kernels.cpu.asking import CompiledAsker


@dataclass(frozen=True, slots=True)
class StackedLayer:
    """One of several layers, and its attention."""

    op: LayerOp
    attention: LayerParams


class StackTimes(NamedTuple):
    """Of the attention within a stack, in seconds: all, the own pool's part, and sending queries to other daemons."""

    attention_s: float
    local_s: float
    asking_s: float


class LeftAttention(NamedTuple):
    """How far a layer has come with an attention that it has left.

    Attributes:
        sent, taken: how many of the daemons it is done with sending queries to, and with taking answers from.
        local: the partial state over the own pool with what was taken, [rows, q_heads, head_dim] and [rows, q_heads]
            float32; None: it is not computed yet.
    """

    sent: int = 0
    taken: int = 0
    local: tuple[Tensor, Tensor] | None = None


NOT_BEGUN = LeftAttention()


class StackRun(ABC):
    """One pass through a stack of layers.

    Attributes:
        output: the last layer's, once ``advance`` has come to the end; a new tensor.
    """

    output: Tensor

    @property
    @abstractmethod
    def times(self) -> StackTimes:
        """Without attention that was left to the caller before it was begun."""

    @abstractmethod
    def leave(self, which: Sequence[bool]) -> None:
        """These layers leave their attention to the caller."""

    @abstractmethod
    def ask(self, askers: Sequence[CompiledAsker]) -> None:
        """Layers ask these daemons, where ``advance`` lets them. They are kept."""

    @abstractmethod
    def advance(self, may_ask: bool) -> int | None:
        """Computes up to the next attention that is left to the caller; answers its layer, or None at the end.

        Args:
            may_ask: the askers' connections are lent. If not, layers that would ask leave their attention.
        """

    @property
    @abstractmethod
    def left(self) -> LeftAttention:
        """Of that layer. Valid up to ``advance``."""

    @property
    @abstractmethod
    def q(self) -> Tensor:
        """[rows, q_heads, head_dim], of that layer; its keys and values are stored. Valid up to ``advance``."""

    @abstractmethod
    def put(self, attended: Tensor) -> None:
        """[rows, q_heads, head_dim], its attention; ``advance`` may follow."""


class LayerStack(ABC):
    """Several decoder layers, one behind the other, with attention over one pool.

    Attributes:
        attention: of each layer.
    """

    attention: Sequence[LayerParams]

    @abstractmethod
    def begin(
        self,
        x: Tensor,
        angles: Sequence[LayerAngles],
        kernels: AttentionKernels,
        pool: Tensor,
        plan: AttentionPlan,
        slots: Tensor,
    ) -> StackRun | None:
        """None where kernels or pool are not what the layers can be computed with.

        Args:
            x: [..., hidden], rows in all; contiguous.
            angles: of each layer, as in ``LayerOp.begin``.
            pool, plan, slots: as in ``AttentionKernels``; keys and values are stored, then read.
        """
