"""transformers, imported without the parts of torch that an instance never calls.

transformers' modules name torch's compiler (``torch._dynamo``, which brings sympy, triton and ONNX's exporter) in
decorators, and its sharded tensors (``torch.distributed.tensor``) in type checks: half of what an instance loads, for
functions that are never compiled and tensors that are never sharded. So, while they are imported,

* transformers hears that this torch has no distributed package, which it knows from torch's builds without one, but
  for a model that several ranks share (``torch_parts``);
* and that Hugging Face's package ``kernels`` is not there: ours is, of which it would look for the version among the
  files of everything that is installed;
* it reads the names in its models' files once instead of twice; and
* a stand-in for ``torch._dynamo`` leaves decorated functions as they are. Asked for anything else it gives way to the
  real one, and it is gone afterwards: who compiles later gets the real one.

Import transformers from here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers.utils
from transformers.utils import import_utils

from services.instance import torch_parts

_COMPILER = "torch._dynamo"
_VMAP_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"


class _TransformGetItemToIndex:
    """As torch's, which masks that are functions are made with; loads it when entered."""

    def __enter__(self) -> None:
        self._real = importlib.import_module(_VMAP_INDEXING).TransformGetItemToIndex()
        self._real.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._real.__exit__(*exception)


class _StandIn(ModuleType):
    """``torch._dynamo`` as far as decorators go."""

    def disable(
        self, function: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Any:
        return (lambda later: later) if function is None else function

    def allow_in_graph(self, function: Any) -> Any:
        return function

    def assume_constant_result(self, function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # importlib's own questions, but for a submodule's place
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(_COMPILER), name)


def _remove_stand_ins() -> None:
    if isinstance(sys.modules.get(_COMPILER), _StandIn):
        del sys.modules[_COMPILER], sys.modules[_VMAP_INDEXING]


@contextmanager
def without_compiler() -> Iterator[None]:
    """Around what imports models and makes them (torch's functions of placeholders without values are decorated, too).
    No other thread may import meanwhile."""
    if _COMPILER in sys.modules:
        yield
        return
    indexing = ModuleType(_VMAP_INDEXING)
    indexing.__dict__["TransformGetItemToIndex"] = _TransformGetItemToIndex
    sys.modules[_COMPILER], sys.modules[_VMAP_INDEXING] = _StandIn(_COMPILER), indexing
    try:
        yield
    finally:
        _remove_stand_ins()


def _inform_transformers() -> None:
    """Spares transformers some questions, before its modules ask them."""
    if "transformers.modeling_utils" in sys.modules:
        return
    first = import_utils.define_import_structure
    models = Path(import_utils.__file__).parents[1] / "models"

    def names(module_path: str | Path, prefix: str | None = None) -> dict[frozenset[str], dict[str, set[str]]]:
        if prefix is not None or Path(module_path) != models / "__init__.py":
            return first(module_path, prefix=prefix)  # type: ignore[no-any-return]
        found = first(models, prefix="models")  # by ``transformers`` itself, which has read all models' files
        dotted = "models."
        return {
            needs: {name.removeprefix(dotted): those for name, those in parts.items() if name.startswith(dotted)}
            for needs, parts in found.items()
        }

    import_utils.define_import_structure = names
    absent = ["is_kernels_available"]
    if not torch_parts.sharded_tensors:
        absent.append("is_torch_distributed_available")
    for question in absent:
        for module in (transformers.utils, import_utils):
            setattr(module, question, lambda *_: False)


_inform_transformers()
with without_compiler():
    import transformers.masking_utils
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
    from transformers.modeling_utils import AttentionInterface

__all__ = ["AttentionInterface", "AutoConfig", "AutoModelForCausalLM", "PretrainedConfig"]
