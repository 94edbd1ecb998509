"""``python architecture_rank.py RANK DEGREE DIRECTORY``: one rank of many small models, one after the other.

Each is written, loaded in parts and probed; rank 0 prints a line of JSON for it: how far its logits are from the whole
model's, as a part of their spread, or why it is refused.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path

from services.instance import torch_parts

torch_parts.sharded_tensors = True  # before transformers is imported

import torch
from architectures import SERVED, VOCAB_SIZE
from torch import Tensor, distributed

import kernels
from services.core.errors import UnsupportedModelError
from services.instance.architecture import set_attention
from services.instance.model import Model, load_model
from services.instance.probe import probe
from services.instance.ranks.group import join_group
from services.instance.ranks.part import ModelPart

TIMEOUT_S = 120.0


def main() -> None:
    part, directory = ModelPart(int(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3])
    torch.set_num_threads(1)
    join_group(part, directory / "store", TIMEOUT_S)
    for architecture in SERVED:
        path = directory / architecture.name
        if part.rank == 0:
            architecture.write(path)
        distributed.barrier()
        told: dict[str, object] = {"name": architecture.name}
        try:
            model = load_model(path, "float32", None, part=part)
            probe(model, kernels.load("cpu"), 64, "float32")
            logits = by_eager(model)
            if part.rank == 0:
                whole = by_eager(load_model(path, "float32", None))
                told["error"] = float((logits - whole).abs().max() / whole.std())
        except UnsupportedModelError as error:  # on all ranks alike, and before anybody waits for another
            told["refused"] = str(error)
        if part.rank == 0:
            print(json.dumps(told), flush=True)


def by_eager(model: Model) -> Tensor:
    """[rows, vocab_size] logits of some tokens, without DistAttention."""
    set_attention(model.module, "eager")
    rows = torch.arange(40)
    return model.forward(torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)), rows, rows)


if __name__ == "__main__":
    main()
