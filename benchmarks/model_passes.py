"""``python -m benchmarks.model_passes``: what the passes over a loaded model save, and what is left to save.

One forward of a model without attention (its place is taken by a function that does nothing): as transformers computes
it, with one pass after the other, and beside it nothing but the matrix products of the model with all passes: by
oneDNN's kernels with packed weights, which is the measure, and by the project's own where the processor has what they
need. All are measured in turn, in CPU time of the thread, so that what else the machine does counts little; with
several threads in elapsed time.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.checkpoints import SHAPES, write_random_checkpoint
from benchmarks.harness import Peer, Run, main
from kernels import LayerParams
from kernels.layer_ops import LinearOp, TorchLayerOps
from services.instance.dist_attention import AttentionContext
from services.instance.model import Model, load_model
from services.instance.passes import PASSES
from services.instance.passes.apply import apply_passes
from services.instance.passes.linears import PackedLinear

QUESTION = "how near does a model's forward, attention left out, come to its bare matrix products?"
_DTYPE = "bfloat16"
_REPETITIONS = 9
_SAMPLE_S = 0.05  # a sample is the mean of so many forwards that it takes about this long
_ONEDNN, _OWN = "(oneDNN's products)", "(own products)"


@dataclass(frozen=True, slots=True)
class _Case:
    """Attributes: sampled: rows whose logits are computed."""

    rows: int
    sampled: int

    @property
    def name(self) -> str:
        return f"{self.rows} decode" if self.sampled == self.rows else f"{self.rows} prefill"


CASES = (_Case(1, 1), _Case(8, 8), _Case(64, 64), _Case(512, 1))


class _NoAttention(AttentionContext):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        return q.contiguous()


def measure(run: Run) -> None:
    torch.set_num_threads(run.options.threads)
    for name in run.options.models:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            run.progress.update(f"{name}: making the checkpoint")
            write_random_checkpoint(path, SHAPES[name])
            model = load_model(path, _DTYPE, None)
        variants = _variants(run, name, model)
        for case in CASES[:1] if run.quick else CASES:
            _measure_case(run, name, variants, case)


def _variants(run: Run, name: str, model: Model) -> dict[str, Model]:
    """The model with none, one, two, ... of the passes; weights that no pass touches are shared."""
    variants = {"none": model}
    for count in range(1, len(PASSES)):  # the last one carries attention, too, which is left out here
        run.progress.update(f"{name}: {', '.join(PASSES[:count])}")
        variant = copy.deepcopy(model, {id(tensor): tensor for tensor in model.module.parameters()})
        apply_passes(variant, PASSES[:count], run.options.threads)
        variants[f"+ {PASSES[count - 1]}"] = variant
    for variant in variants.values():
        _NoAttention().attach_to(variant.module)
    return variants


def _measure_case(run: Run, name: str, variants: dict[str, Model], case: _Case) -> None:
    calls: dict[str, Callable[[], object]] = {
        _ONEDNN: _products(variants["+ fuse_linears"], case),
        _OWN: _products(variants["+ fuse_attention"], case),
    }
    calls.update((key, _forward(model, case)) for key, model in variants.items())
    clock = time.thread_time if run.options.threads == 1 else time.perf_counter
    peers = [Peer(key, partial(_time, call, clock)) for key, call in calls.items()]
    results = run.alternate(peers, _REPETITIONS)
    products, none = results[_ONEDNN].median, results["none"].median
    for key, samples in results.items():
        run.row(
            {
                "model": name,
                "rows": case.name,
                "passes": key,
                "forward_ms": 1e3 * samples.median,
                "spread_ms": 1e3 * samples.spread,
                "over_products": samples.median / products,
                "speedup": none / samples.median,
            }
        )
    *_, last = results.values()
    case_name = f"{name}_{case.name.replace(' ', '_')}"
    run.summary(f"speedup_{case_name}", none / last.median)
    run.target(f"over_products_{case_name}", last.median / products, at_most=1.1)


def _forward(model: Model, case: _Case) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(case.rows)
    tokens = torch.randint(0, model.shape.vocab_size, (case.rows,), generator=generator)
    positions = torch.arange(case.rows)
    sampled = torch.arange(case.rows - case.sampled, case.rows)
    return lambda: model.forward(tokens, positions, sampled)


def _products(model: Model, case: _Case) -> Callable[[], object]:
    """Every matrix product of the model once, each with an input of its own; plain weights are packed for oneDNN."""
    calls: list[tuple[LinearOp, Tensor]] = []
    for module in model.module.modules():
        op = module.op if isinstance(module, PackedLinear) else None
        if isinstance(module, nn.Linear):
            op = TorchLayerOps().linear(module.weight, module.bias)
        if op is None:
            continue
        assert isinstance(module, PackedLinear | nn.Linear)
        rows = case.sampled if module.out_features == model.shape.vocab_size else case.rows
        calls.append((op, torch.randn(1, rows, module.in_features).to(torch.bfloat16)))

    @torch.inference_mode()
    def compute() -> None:
        for op, x in calls:
            op(x)

    return compute


def _time(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    begin, count = clock(), 0
    while clock() - begin < _SAMPLE_S:
        call()
        count += 1
    return (clock() - begin) / count


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main("model_passes", QUESTION, measure, _add_arguments))
