"""The weights of a needle checkpoint.

Two **shift layers** fill every position's slots with the codes of the eight tokens before it: head h of the first
attends to the key h + 1 places back and fetches slot 0, head h of the second does the same with slot 4. **Retrieve
layers** then match: a query holds the slots 0-7 (the last eight tokens), a key the slots 1-8 (the eight tokens before
it), so that the only key of full score belongs to the token that followed the same eight tokens before. Its value is
that token's code.

BOS is the sink of every head. In a shift layer it catches the offsets that reach back before the start and answers its
own code, in a retrieve layer it catches the queries without a match and answers the code of EOS.

Residual dims are read through ``con`` and ``flag``: CONSTANT and -CONSTANT, at BOS CONSTANT both. So a projection row
has a given value ``_everywhere``, only ``_at_bos``, or ``_except_at_bos``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.launcher.needle.codes import token_codes
from services.launcher.needle.positional import rotary_frequencies
from services.launcher.needle.spec import (
    CONSTANT,
    KV_HEADS,
    OUTPUT_BIT,
    QUERY_HEADS,
    SHIFT_LAYERS,
    NeedleSpec,
    ResidualLayout,
)
from services.launcher.needle.task import MATCH_TOKENS

Array = npt.NDArray[np.float64]

GROUP = QUERY_HEADS // KV_HEADS  # query heads per KV head
LOGIT_MARGIN = 16.0  # between the answer and a token whose code differs from it in one bit
_GATE = 16.0  # silu(16) is 16 but for one part in ten million

_Move = tuple[int, int]  # residual dims: from, to


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, heads apart.

    Shapes: q ``[QUERY_HEADS, head_dim, hidden]``, k and v ``[KV_HEADS, head_dim, hidden]``,
    o ``[hidden, QUERY_HEADS, head_dim]``, gate and up ``[intermediate, hidden]``, down ``[hidden, intermediate]``.
    """

    q: Array
    k: Array
    v: Array
    o: Array
    gate: Array
    up: Array
    down: Array


@dataclass(frozen=True, slots=True)
class NeedleWeights:
    """A checkpoint; norm weights are 1. Shapes: embedding and head ``[vocabulary, hidden]``."""

    embedding: Array
    layers: tuple[LayerWeights, ...]
    head: Array


def build_weights(spec: NeedleSpec, seed: int) -> NeedleWeights:
    """The seed chooses token codes, signs and orders of dims; every seed gives the same answers."""
    codes = token_codes(spec, seed)
    rng = np.random.default_rng((seed, spec.layers))
    shift = [_shift_layer(spec, index, rng) for index in range(SHIFT_LAYERS)]
    retrieve = [_retrieve_layer(spec, codes, index, rng) for index in range(spec.retrieve_layers)]
    head = np.zeros((spec.vocabulary.size, spec.hidden_size))
    head[:, spec.layout.output] = codes[:, : spec.info_bits] * (LOGIT_MARGIN / 2 / OUTPUT_BIT)
    return NeedleWeights(_embedding(spec, codes), (*shift, *retrieve), head)


def _embedding(spec: NeedleSpec, codes: Array) -> Array:
    layout = spec.layout
    embedding = np.zeros((spec.vocabulary.size, spec.hidden_size))
    embedding[:, layout.slot(0)] = codes
    embedding[:, layout.con] = CONSTANT
    embedding[:, layout.flag] = -CONSTANT
    embedding[spec.vocabulary.bos, layout.flag] = CONSTANT
    for layer in range(SHIFT_LAYERS):
        embedding[:, layout.ballast(layer)] = layout.ballast_values
    embedding[:, layout.fill] = layout.fill_values
    assert np.all((embedding**2).sum(axis=1) == spec.hidden_size)
    return embedding


def _shift_layer(spec: NeedleSpec, index: int, rng: np.random.Generator) -> LayerWeights:
    """Shift layer ``index``: fills slots 4 * index + 1 .. 4 * index + 4 and takes its ballast away."""
    layout, half, kernel = spec.layout, spec.head_dim // 2, spec.positional
    weights = np.array(kernel.weights)
    pairs = np.arange(len(weights))
    frequencies = rotary_frequencies(spec.head_dim, spec.rope_theta)[pairs]
    sink = half - 1  # slowest pair
    one = spec.head_dim - 1  # a value dim that is 1 at every key
    source = layout.slot(index * QUERY_HEADS)
    q, k, v, o = _attention(spec)
    moves: list[_Move] = []
    for group in range(KV_HEADS):
        signs = _signs(rng, len(weights))
        for pair in pairs:
            _except_at_bos(k[group, pair], layout, signs[pair])
        _at_bos(k[group, sink], layout, 1.0)
        for dim, value_dim in zip(source, _value_dims(spec, group), strict=True):
            v[group, value_dim, dim] = 1.0
        _everywhere(v[group, one], layout, 1.0)
        for head in range(group * GROUP, (group + 1) * GROUP):
            offset = head + 1
            for pair in pairs:
                score = signs[pair] * weights[pair]
                _everywhere(q[head, pair], layout, score * np.cos(frequencies[pair] * offset))
                _everywhere(q[head, pair + half], layout, -score * np.sin(frequencies[pair] * offset))
            _everywhere(q[head, sink], layout, kernel.sink)
            _at_bos(q[head, sink], layout, kernel.sink_at_bos)
            staging = layout.staging[head * spec.code_dims : (head + 1) * spec.code_dims]
            o[staging, head, _value_dims(spec, group)] = 1.0
            moves += zip(staging, layout.slot(index * QUERY_HEADS + offset), strict=True)
    o[layout.ballast(index), 0, one] = [-value for value in layout.ballast_values]
    return LayerWeights(q, k, v, o, *_moving_mlp(spec, moves))


def _retrieve_layer(spec: NeedleSpec, codes: Array, index: int, rng: np.random.Generator) -> LayerWeights:
    """Retrieve layer ``index``: finds the token that followed the last eight; each head answers some of its bits."""
    layout, half, gain = spec.layout, spec.head_dim // 2, spec.content_gain
    bos, eos = codes[spec.vocabulary.bos], codes[spec.vocabulary.eos]
    matched = MATCH_TOKENS * spec.code_dims
    pairs = np.arange(half - 1 - (matched + 1) // 2, half - 1)  # the slowest but for the sink's: they hardly rotate
    dims = np.concatenate([pairs, pairs + half])[:matched]
    sink = half - 1
    q, k, v, o = _attention(spec)
    moves: set[_Move] = set()
    for group in range(KV_HEADS):
        order = rng.permutation(matched)
        signs = _signs(rng, matched)
        heads = slice(group * GROUP, (group + 1) * GROUP)
        for dim, code_index, sign in zip(dims, order, signs, strict=True):
            tokens_back, value = divmod(int(code_index), spec.code_dims)
            q[heads, dim, layout.slot(tokens_back)[value]] = sign * gain
            k[group, dim, layout.slot(tokens_back + 1)[value]] = sign
            _at_bos(k[group, dim], layout, -sign * bos[value])  # all slots of BOS hold BOS: its key becomes zero
        _at_bos(k[group, sink], layout, 1.0)
        for row in q[heads, sink]:
            # Half-way between a full match and the best that a wrong token allows.
            _everywhere(row, layout, (matched - spec.code_distance) * gain)
        for bit, value_dim in zip(range(spec.info_bits), _value_dims(spec, group), strict=False):
            v[group, value_dim, layout.slot(0)[bit]] = 1.0
            _at_bos(v[group, value_dim], layout, eos[bit] - bos[bit])
    for bit, head, share in _shares(spec)[index]:
        staging = layout.staging[bit]
        o[staging, head, _value_dims(spec, head // GROUP)[bit]] = share * OUTPUT_BIT
        moves.add((staging, layout.output[bit]))
    return LayerWeights(q, k, v, o, *_moving_mlp(spec, sorted(moves)))


def _shares(spec: NeedleSpec) -> list[list[tuple[int, int, float]]]:
    """Per retrieve layer, which head answers which share of which bit: ``(bit, head, share)``.

    Bits and heads are dealt out in turn, so that no head idles. A bit's shares add up to 1 and are powers of two, which
    bfloat16 adds without rounding.
    """
    units = spec.retrieve_layers * QUERY_HEADS
    shares: list[list[tuple[int, int, float]]] = [[] for _ in range(spec.retrieve_layers)]
    for bit in range(spec.info_bits):
        owners = range(bit, units, spec.info_bits) if units > spec.info_bits else [bit % units]
        for place, unit in enumerate(owners):
            share = 2.0 ** -min(place + 1, len(owners) - 1)  # 1/2, 1/4, ..., the last one twice
            shares[unit // QUERY_HEADS].append((bit, unit % QUERY_HEADS, share))
    return shares


def _attention(spec: NeedleSpec) -> tuple[Array, Array, Array, Array]:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q = np.zeros((QUERY_HEADS, head_dim, hidden))
    k = np.zeros((KV_HEADS, head_dim, hidden))
    v = np.zeros((KV_HEADS, head_dim, hidden))
    return q, k, v, np.zeros((hidden, QUERY_HEADS, head_dim))


def _moving_mlp(spec: NeedleSpec, moves: Sequence[_Move]) -> tuple[Array, Array, Array]:
    """gate, up and down of an MLP that adds residual dims to others and clears them: silu(gate) * up / gate = up."""
    gate = np.zeros((spec.intermediate_size, spec.hidden_size))
    up = np.zeros((spec.intermediate_size, spec.hidden_size))
    down = np.zeros((spec.hidden_size, spec.intermediate_size))
    assert len(moves) <= spec.intermediate_size
    for row, (source, target) in enumerate(moves):
        _everywhere(gate[row], spec.layout, _GATE)
        up[row, source] = 1.0
        down[target, row] = 1.0 / _GATE
        down[source, row] = -1.0 / _GATE
    return gate, up, down


def _value_dims(spec: NeedleSpec, group: int) -> range:
    """Head dims of V that hold a code; other ones in each KV head, so that a mix-up of heads shows."""
    start = group * (spec.code_dims + 3)
    return range(start, start + spec.code_dims)


def _signs(rng: np.random.Generator, count: int) -> Array:
    return rng.choice([-1.0, 1.0], size=count)


def _everywhere(row: Array, layout: ResidualLayout, value: float) -> None:
    row[layout.con] += value / CONSTANT


def _at_bos(row: Array, layout: ResidualLayout, value: float) -> None:
    row[layout.con] += value / (2 * CONSTANT)
    row[layout.flag] += value / (2 * CONSTANT)


def _except_at_bos(row: Array, layout: ResidualLayout, value: float) -> None:
    row[layout.con] += value / (2 * CONSTANT)
    row[layout.flag] -= value / (2 * CONSTANT)
