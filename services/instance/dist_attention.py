"""DistAttention as an attention function of transformers.

transformers calls one function per layer with the new tokens' q, k and v (keys already rotated). Here that call

1. writes k and v into the step's open blocks,
2. sends q to the daemons that hold other blocks of the batch's sequences,
3. computes the partial state over the local pool meanwhile,
4. collects the remote partial states and merges them.

The batch is one packed row ``[1, total tokens]``; which rows belong to which sequence is the step's plan. transformers
builds no mask for an attention function it does not know, so nothing quadratic is allocated.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import AttentionKernels, AttentionPlan, LayerParams
from kernels.layer_ops import LayerAngles
from kernels.layer_stack import NOT_BEGUN, LayerStack, LeftAttention, StackRun
from services.core.errors import UnsupportedModelError
from services.dataplane.device import Device
from services.dataplane.host_device import HostDevice
from services.dataplane.remote_attention import RemoteAttention
from services.instance.step_timings import AttentionTimes

ATTENTION_NAME = "infinite_llm_dist_attention"
_CONTEXT = (
    "_infinite_llm_dist_attention"  # attribute of the attention modules; some models drop custom keyword arguments
)
_MARKS = 4  # of the watch, in each layer
_HARMLESS_TENSORS = ("position_ids", "cache_position")


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's plan, the same for all layers.

    Attributes:
        slots: [rows] int64, where the rows' k and v go in the local pool (block * block_tokens + offset).
        local: the local part of every row; each sequence has at least its open block here.
        sampled: the local part of the rows that are sampled, where these are some of the rows, or none, and the last
            layer need attend for no others; None: it must for all.
    """

    slots: Tensor
    local: AttentionPlan
    sampled: AttentionPlan | None = None


class AttentionContext(ABC):
    """Serves the attention calls of one model. Used by the thread that runs the model."""

    def attach_to(self, model: nn.Module) -> None:
        """Makes this object serve all attention modules of a model or part (those with a layer index)."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _CONTEXT, self)

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        """One layer's attention.

        Args:
            q: [rows, q_heads, key_dim]; k: [rows, kv_heads, key_dim]; v: [rows, kv_heads, value_dim].
            sinks: [q_heads] scores of attention sinks, or None.

        Returns:
            [rows, q_heads, value_dim] in q's dtype, contiguous.
        """

    def of_rows(
        self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None, rows: Tensor
    ) -> Tensor:
        """The last layer's attention, as of ``__call__``, of the rows that anybody wants: those that are sampled.

        Args:
            rows: [n] int64, of these; where none is sampled, one, and whatever is answered for it.
        """
        return self(q, k, v, params, sinks).index_select(0, rows)

    def through(self, stack: LayerStack, x: Tensor, angles: Sequence[LayerAngles]) -> Tensor | None:
        """Several layers with their attention; None: they are called one by one.

        Args:
            x: [1, rows, hidden].
            angles: of each layer.
        """
        return None


class DistAttention(AttentionContext):
    """Computes attention for one engine. Used by the engine thread.

    Where keys or values are narrower than a block's head_dim (latent attention has keys wider than values), zeros fill
    them up: they add nothing to a score, and what they give in the output is cut off.

    Args:
        pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], the mapped local pool.
        remote: None where there are no other daemons (the probe at load).
        device: that has the pool; the CPU where none is given.
    """

    def __init__(
        self, kernels: AttentionKernels, pool: Tensor, remote: RemoteAttention | None, device: Device | None = None
    ) -> None:
        self._kernels = kernels
        self._pool = pool
        self._head_dim, self._dtype = pool.shape[5], pool.dtype
        self._remote = remote
        self._step: StepTensors | None = None
        self.calls = 0
        self._watch = (device or HostDevice()).stopwatch()
        self._times = AttentionTimes()

    def begin_step(self, step: StepTensors) -> None:
        """``step``: on the device."""
        self._step = step
        self._watch.reset()  # a discarded step leaves marks
        self._times.reset()

    @property
    def times(self) -> AttentionTimes:
        """Of the step; its layers are done, the device has settled."""
        marks = self._watch.take()
        for at in range(0, len(marks), _MARKS):
            begun, local_begun, local_ended, ended = marks[at : at + _MARKS]
            self._times.add(ended - begun, local_ended - local_begun, local_begun - begun)
        return self._times

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        step = self._step
        assert step is not None, "begin_step comes before the model's forward"
        self._store(k, v, step, params)
        return self._answer(self._attend(self._fit(q), step.local, params, sinks, NOT_BEGUN), q, v)

    def of_rows(
        self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None, rows: Tensor
    ) -> Tensor:
        step, remote = self._step, self._remote
        assert step is not None, "begin_step comes before the model's forward"
        plan = step.sampled
        if plan is None or (remote is not None and not remote.may_be_left_out(params, nobody_asks=plan.segments == 0)):
            return super().of_rows(q, k, v, params, sinks, rows)
        self._store(k, v, step, params)
        if plan.segments == 0:
            return q.new_zeros(len(rows), q.shape[1], v.shape[2])
        return self._answer(self._attend(self._fit(q.index_select(0, rows)), plan, params, sinks, NOT_BEGUN), q, v)

    def _store(self, k: Tensor, v: Tensor, step: StepTensors, params: LayerParams) -> None:
        self._kernels.store_kv(self._fit(k), self._fit(v), self._pool, step.slots, params.layer)
        self.calls += 1

    def _answer(self, out: Tensor, q: Tensor, v: Tensor) -> Tensor:
        if v.shape[2] < self._head_dim:
            out = out[..., : v.shape[2]].contiguous()
        return out if out.dtype is q.dtype else out.to(q.dtype)

    def through(self, stack: LayerStack, x: Tensor, angles: Sequence[LayerAngles]) -> Tensor | None:
        step, remote = self._step, self._remote
        assert step is not None, "begin_step comes before the model's forward"
        run = stack.begin(x, angles, self._kernels, self._pool, step.local, step.slots)
        if run is None:
            return None
        askers = [] if remote is None else remote.askers(run.q)
        if askers is None:
            leaves = [remote is not None and remote.asks(params) for params in stack.attention]
            run.leave(leaves)
        elif askers:
            run.ask(askers)
        while (layer := self._advance(run, remote if askers else None)) is not None:
            run.put(self._finish(run, step, stack.attention[layer]))
        self.calls += len(stack.attention)
        self._times.add(*run.times)
        return run.output

    def _advance(self, run: StackRun, asks: RemoteAttention | None) -> int | None:
        """Args: asks: what the run's layers ask with."""
        if asks is None or not asks.lend():
            return run.advance(may_ask=False)
        try:
            return run.advance(may_ask=True)
        finally:
            asks.take_back()

    def _finish(self, run: StackRun, step: StepTensors, params: LayerParams) -> Tensor:
        """Of a layer of a stack the attention that it has left, or the rest of it."""
        left = run.left
        if left.local is None:
            return self._attend(run.q, step.local, params, None, left)
        assert self._remote is not None
        begun = time.perf_counter()
        self._remote.submit(params, run.q, left)
        self._remote.collect(*left.local)
        self._times.add(time.perf_counter() - begun, 0.0)
        return left.local[0]

    def _attend(
        self, q: Tensor, local: AttentionPlan, params: LayerParams, sinks: Tensor | None, left: LeftAttention
    ) -> Tensor:
        """Over keys and values that are stored: [rows, q_heads, head_dim], in float32 where anything is merged.

        Args:
            left: how many daemons have been asked already.
        """
        self._watch.mark()
        remote = self._remote if self._remote is not None and self._remote.submit(params, q, left) else None
        merging = remote is not None or sinks is not None
        out = torch.empty(q.shape, dtype=torch.float32 if merging else q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._watch.mark()
        self._kernels.micro_attention(q, self._pool, local, params, out, lse)
        self._watch.mark()
        if remote is not None:
            remote.collect(out, lse)
        self._watch.mark()
        if sinks is not None:
            self._kernels.merge_sinks(out, lse, sinks)
        return out

    def _fit(self, x: Tensor) -> Tensor:
        """[rows, heads, dim] as [rows, heads, the pool's head_dim], in its dtype; each row contiguous."""
        dim = self._head_dim
        if x.shape[2] == x.stride(1) == dim and x.stride(2) == 1 and x.dtype is self._dtype:
            return x
        missing = dim - x.shape[2]
        return (functional.pad(x, (0, missing)) if missing else x).to(self._dtype).contiguous()


def dist_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The function registered with transformers; the signature is transformers' contract.

    Args:
        query: [1, q_heads, rows, key_dim]; key: [1, kv_heads, rows, key_dim]; value: [1, kv_heads, rows, value_dim].
        others: position_ids and the switches of the forward call.

    Returns:
        [1, rows, q_heads, value_dim], and no weights.

    Raises:
        UnsupportedModelError: the layer passes something that decides about its attention and is not known here.
    """
    context = attention_context(module)
    _refuse_unknown(module, attention_mask, others)
    params = LayerParams(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scale=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        window=int(sliding_window or 0),
        softcap=float(softcap or 0.0),
    )
    out = context(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), params, s_aux)
    return out.unsqueeze(0), None


def attention_context(module: nn.Module) -> AttentionContext:
    """What is attached to an attention module.

    Raises:
        UnsupportedModelError: it has no layer index, so nothing could be attached.
    """
    context = getattr(module, _CONTEXT, None)
    if not isinstance(context, AttentionContext):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no layer_idx, so its KV cache has no place in a block"
        )
    return context


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, others: Mapping[str, object]) -> None:
    """A mask of the layer's own, biases of scores, chosen keys: whatever comes as a tensor would be left out."""
    tensors = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _HARMLESS_TENSORS]
    if attention_mask is not None:
        tensors.append("attention_mask")
    if tensors:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(tensors)} to its attention function; DistAttention knows "
            "causal attention with windows, soft-caps and sinks only"
        )
