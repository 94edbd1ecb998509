"""What a service's process loads: each of these costs every start of it a tenth of a second or more, and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from random_llama import write_random_llama

_COMPILER = ("torch._dynamo", "torch._inductor", "torch.onnx", "triton", "torch.distributed.tensor")
_NEVER = {
    "gmanager": ("torch", "numpy", "transformers", "tokenizers", "llguidance", "redis", "jinja2", "pydantic"),
    "gateway": ("torch", "transformers", "huggingface_hub"),
    "kvdaemon": ("transformers", "tokenizers", "llguidance", "sympy", *_COMPILER),
    "instance": ("scipy", "sklearn", "pandas", *_COMPILER),
}


def _run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _loaded(code: str, modules: tuple[str, ...]) -> str:
    """Which of the modules are there after ``code``."""
    return _run(f"import sys\n{code}\nprint(*sorted(sys.modules.keys() & set({modules})))").strip()


@pytest.mark.parametrize("service", _NEVER)
def test_a_service_loads_only_what_it_needs(service: str) -> None:
    assert _loaded(f"import services.{service}.service", _NEVER[service]) == ""


def test_the_command_line_loads_no_torch() -> None:
    assert _loaded("import services.launcher.cli", ("torch", "transformers", "tokenizers", "safetensors")) == ""


def test_a_model_is_loaded_without_the_compiler_which_works_afterwards(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model")
    load = (
        "from pathlib import Path\n"
        "from services.instance.model import load_model\n"
        f"load_model(Path({str(tmp_path / 'model')!r}), 'float32', None)"
    )
    assert _loaded(load, _COMPILER) == ""
    compile_something = (
        "import torch\n"
        "from transformers import masking_utils\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.zeros(1)).item())\n"
        "with masking_utils.TransformGetItemToIndex():\n"
        "    print(torch.vmap(lambda i: torch.arange(3)[i])(torch.tensor([2, 1])).tolist())\n"
    )
    assert _run(f"{load}\n{compile_something}").split("\n")[-3:-1] == ["1.0", "[2, 1]"]
