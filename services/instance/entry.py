"""From the command line to the instance. What an instance is made of is imported once its configuration is known."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from services.core.errors import InfiniteLLMError
from services.instance import torch_parts
from services.instance.config import InstanceConfig
from services.runtime.config import load_config
from services.runtime.logs import setup_logging
from services.runtime.process import loading


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.instance", description="One instance of infinite-llm.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys as in services/instance/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(InstanceConfig, arguments.config)
        setup_logging("instance", config.member_id)
        torch_parts.sharded_tensors = config.tensor_parallel > 1
        with loading():
            from services.instance.service import run
        run(config, arguments.config)
    except InfiniteLLMError as error:
        sys.exit(f"infinite-llm instance: {error}")
    return 0
