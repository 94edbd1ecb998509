"""``python -m services.launcher.needle_model DIR``: builds the checkpoint whose right answer is known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from services.core.errors import ConfigError
from services.launcher.needle.checkpoint import Dtype, write_checkpoint
from services.launcher.needle.spec import Preset, needle_spec


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.launcher.needle_model", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the checkpoint is written")
    parser.add_argument("--preset", choices=get_args(Preset), default="std", help="mini is the smallest; default std")
    parser.add_argument("--layers", type=int, default=4, help="4, or 8 to spread the answer over six retrieve layers")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="chooses codes and signs; the answers stay the same")
    options = parser.parse_args(arguments)
    try:
        spec = needle_spec(options.preset, options.layers)
    except ConfigError as error:
        parser.error(str(error))
    size = write_checkpoint(options.directory, spec, options.dtype, options.seed)
    print(
        f"{options.directory}: needle {options.preset}, {spec.layers} layers, {options.dtype}, "
        f"{size.weight_bytes / 1e6:.1f} MB of weights, {size.kv_bytes_per_token / 1024:g} KiB of KV cache a token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
