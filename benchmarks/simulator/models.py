"""The models, as far as their shapes decide what a step costs; from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model in 16-bit weights and KV cache.

    Attributes:
        parameters: all that are read in a step.
        hidden: width of the residual stream.
        devices: that one instance takes where memory is pooled, see README.md.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    devices: int
    head_dim: int = 128

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def flops_per_token(self) -> float:
        """Of everything but attention."""
        return 2 * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        return self.layers * self.kv_heads * 2 * self.head_dim * 2

    @property
    def row_bytes(self) -> int:
        """A token's queries of one layer, or the partial output that comes back."""
        return self.heads * self.head_dim * 2

    @property
    def flops_per_pair(self) -> float:
        """Attention of one token to one other, all layers: two products."""
        return 4 * self.layers * self.heads * self.head_dim


MODELS = (
    ModelShape("llama2-7b", 6.74e9, layers=32, hidden=4096, heads=32, kv_heads=32, devices=1),
    ModelShape("llama2-13b", 13.02e9, layers=40, hidden=5120, heads=40, kv_heads=40, devices=2),
    ModelShape("llama2-70b", 68.98e9, layers=80, hidden=8192, heads=64, kv_heads=8, devices=8),
    ModelShape("llama3-8b", 8.03e9, layers=32, hidden=4096, heads=32, kv_heads=8, devices=1),
    ModelShape("llama3-70b", 70.55e9, layers=80, hidden=8192, heads=64, kv_heads=8, devices=8),
)
