"""What a step takes in the simulated cluster: the truth that the planner's cost model has to find out.

It is built from other terms than that model on purpose (the larger of two rates instead of two straight lines, bytes on
links, a price for each message posted, all-reduces), so the planner's predictions are as wrong as they would be.

All times are in seconds for one step over all layers, unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from benchmarks.simulator.hardware import Hardware
from benchmarks.simulator.models import ModelShape

POST_S = 1e-6  # one message of one layer, for whoever sends it
QUERY_S = 5e-6  # one query of one layer, for the device that computes it


@dataclass(frozen=True, slots=True)
class Link:
    """Between two instances, one direction."""

    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """One instance: a model split over some devices by tensor parallelism.

    Attributes:
        weights_s: reading them.
        token_s: arithmetic of one token.
        kernels_s: what a step takes however small its batch.
        reduce_s, reduce_token_s: all-reduces of a step, and what each of its tokens adds.
        context_token_s: reading one token's keys and values.
        pair_s: attention of one prefill token to one token.
        attention_s: attention of a step, however little it reads.
        row_bytes: a token's queries of one layer.
        kv_tokens: that the devices' memory holds besides the weights.
    """

    layers: int
    weights_s: float
    token_s: float
    kernels_s: float
    reduce_s: float
    reduce_token_s: float
    context_token_s: float
    pair_s: float
    attention_s: float
    row_bytes: int
    kv_tokens: int

    @classmethod
    def of(cls, model: ModelShape, hardware: Hardware, devices: int) -> Self:
        """
        Raises: ValueError if the weights alone do not fit.
        """
        reads = devices * hardware.bytes_per_s * hardware.read
        usable = devices * (hardware.memory_bytes * hardware.usable - hardware.reserved_bytes)
        left = usable - model.weight_bytes
        if left <= 0:
            raise ValueError(f"{model.name} does not fit {devices} {hardware.name}")
        reduce_s, reduce_byte_s = _all_reduce(hardware, devices)
        return cls(
            layers=model.layers,
            weights_s=model.weight_bytes / reads,
            token_s=model.flops_per_token / (devices * hardware.flops_per_s * hardware.matmul),
            kernels_s=model.layers * hardware.kernels_s,
            reduce_s=2 * model.layers * reduce_s,
            reduce_token_s=2 * model.layers * reduce_byte_s * 2 * model.hidden,
            context_token_s=model.kv_bytes_per_token / reads,
            pair_s=model.flops_per_pair / (devices * hardware.flops_per_s * hardware.attention),
            attention_s=model.layers * hardware.attention_kernel_s,
            row_bytes=model.row_bytes,
            kv_tokens=int(left / model.kv_bytes_per_token),
        )

    def other_s(self, tokens: int) -> float:
        """All but attention, for a batch of so many tokens."""
        computing_s = max(self.weights_s, tokens * self.token_s)
        return self.kernels_s + computing_s + self.reduce_s + tokens * self.reduce_token_s

    def compute_s(self, context_tokens: float, pairs: float) -> float:
        """Attention on this instance's devices.

        Args:
            context_tokens: that decoding requests read.
            pairs: of a prefill token and a token that it sees.
        """
        return context_tokens * self.context_token_s + pairs * self.pair_s

    def sending_s(self, link: Link, rows: float) -> float:
        """The queries of so many tokens on the link, or their answers."""
        return self.layers * rows * self.row_bytes / link.bytes_per_s

    def prefill_s(self, tokens: int, chunk: int) -> float:
        """A whole prompt alone, for estimates."""
        steps = -(-tokens // chunk)
        other_s = steps * self.other_s(min(tokens, chunk))
        return other_s + steps * self.attention_s + self.pair_s * tokens * tokens / 2


def answer_s(debtor: Rates, lender: Rates, link: Link, rows: float, computing_s: float) -> float:
    """From query to answer: there, computing, and back, in each layer."""
    way_s = debtor.layers * (2 * link.hop_s + QUERY_S) + 2 * debtor.sending_s(link, rows)
    return way_s + computing_s


def _all_reduce(hardware: Hardware, devices: int) -> tuple[float, float]:
    """Seconds of one all-reduce of next to nothing, and for each byte: in the nodes, and between them by a tree."""
    if devices == 1:
        return 0.0, 0.0
    inside = min(devices, hardware.devices_per_node)
    nodes = -(-devices // hardware.devices_per_node)
    byte_s = 2 * (inside - 1) / inside / hardware.local_bytes_per_s
    if nodes == 1:
        return hardware.local_reduce_s, byte_s
    depth = (nodes - 1).bit_length()
    between_s = 2 * (nodes - 1) / nodes / hardware.network_bytes_per_s
    return hardware.local_reduce_s + 2 * depth * hardware.network_hop_s, byte_s + between_s
