"""Puts replacements of single modules into a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from services.instance.passes.check import reproduces
from services.instance.passes.trace import LayerTrace

Replacement = Callable[[nn.Module], nn.Module | None]  # of a module; None: it stays
_Swap = tuple[nn.Module, str, nn.Module]  # parent, name, what was there


def replace_modules(root: nn.Module, layers: Sequence[LayerTrace], replacement: Replacement) -> int:
    """Replaces modules wherever they are; answers how many.

    A layer that does not compute the same afterwards gets all its own back.
    """
    count = 0
    inside: set[nn.Module] = set()
    for layer in layers:
        swaps = _swap(layer.layer.current, replacement, set())
        if reproduces(layer):
            count += len(swaps)
        else:
            for parent, name, module in swaps:
                setattr(parent, name, module)
        inside.update(layer.layer.current.modules())
    return count + len(_swap(root, replacement, inside))


def _swap(root: nn.Module, replacement: Replacement, leave: set[nn.Module]) -> list[_Swap]:
    swaps: list[_Swap] = []
    made: dict[nn.Module, nn.Module] = {}  # a module may be in several places
    for parent in list(root.modules()):
        if parent in leave:
            continue
        for name, child in list(parent.named_children()):
            if child in leave:
                continue
            new = made.get(child) or replacement(child)
            if new is not None:
                made[child] = new
                swaps.append((parent, name, child))
                setattr(parent, name, new)
    return swaps
