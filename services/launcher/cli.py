"""The command ``infinite-llm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

import infinitellm
from infinitellm import SamplingOptions
from services.core.errors import ConfigError, InfiniteLLMError
from services.launcher.demo import DEFAULT_TOKENS, DemoOptions, demo
from services.launcher.doctor import doctor
from services.launcher.generate import generate, read_prompt
from services.launcher.options import ClusterOptions
from services.launcher.ports import HOST
from services.launcher.status import status
from services.launcher.top import top
from services.launcher.up import up
from services.runtime.api_keys import new_key

API_KEY_VARIABLE = "INFINITE_LLM_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; answers its exit code: 0 done, 1 failed, 2 wrongly called, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "up":
            return up(_cluster_options(options))
        if options.command == "status":
            return status(f"{HOST}:{options.grpc_port}", os.environ.get(API_KEY_VARIABLE), as_json=options.json)
        if options.command == "generate":
            return _generate(options)
        if options.command == "top":
            return top(options.address, os.environ.get(API_KEY_VARIABLE), options.interval, options.frames)
        if options.command == "doctor":
            return doctor(options.http_port, options.grpc_port)
        if options.command == "new-key":
            return _new_key(options.name, options.file)
        return demo(_demo_options(options))
    except ConfigError as error:
        print(f"infinite-llm {options.command}: {error}", file=sys.stderr)
        return 2
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        print(f"infinite-llm {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infinite-llm",
        description="Serves language models whose context is longer than one process's memory.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_up(commands)
    _add_status(commands)
    _add_top(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_new_key(commands)
    _add_doctor(commands)
    return parser


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "up",
        help="serve a checkpoint from a cluster on this machine",
        description="Starts etcd, Redis, gManagers, KV daemons, instances and a gateway, and ends them on Ctrl-C.",
        epilog="example: infinite-llm up --model ./checkpoint --instances 2 --kvdaemons 2 --pool-mib 64",
    )
    default = ClusterOptions(model=Path())
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    command.add_argument(
        "--gmanagers", type=int, default=default.gmanagers, help="one leads, the others stand by (default %(default)s)"
    )
    command.add_argument("--instances", type=int, default=default.instances, help="engines (default %(default)s)")
    command.add_argument(
        "--tensor-parallel",
        type=_degrees,
        default=default.tensor_parallel,
        metavar="N[,N...]",
        help="processes that compute an instance's model together: one number for all instances or one for each "
        "(default 1)",
    )
    command.add_argument(
        "--kvdaemons",
        type=int,
        default=default.kvdaemons,
        help="daemons that lend memory, besides the one beside each instance (default %(default)s)",
    )
    command.add_argument(
        "--pool-mib", type=int, default=default.pool_mib, help="memory of each daemon's pool (default %(default)s)"
    )
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=default.dtype,
        help="of weights and KV cache (default %(default)s)",
    )
    command.add_argument(
        "--device",
        default=default.device,
        metavar="cpu|cuda|cuda:N",
        help="where instances and the pools beside them are (default %(default)s)",
    )
    command.add_argument(
        "--memory-device",
        metavar="cpu|cuda|cuda:N",
        help="where the pools of further daemons are (default: as --device; cpu lends host memory to a GPU)",
    )
    command.add_argument(
        "--transport",
        choices=("auto", "shm", "tcp", "rdma", "gloo", "nccl"),
        default=default.transport,
        help="data plane; auto: the best that each two processes have (default %(default)s)",
    )
    command.add_argument(
        "--link",
        metavar="RATE,LATENCY",
        help="emulate such a link on the data plane, as in 25gbit,50us (default: none)",
    )
    command.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest context in tokens (default: the checkpoint's own)"
    )
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='YAML with further keys for the services\' configuration files, as in {"instance": {"max_num_seqs": 8}}',
    )
    command.add_argument(
        "--start-timeout", type=float, default=default.start_timeout_s, metavar="S", help="default %(default)s"
    )
    _add_places(command)


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "status",
        help="show gManagers, instances, daemons, pool use, and where each request's rBlocks lie",
        description=f"Shows its API key where there is one in {API_KEY_VARIABLE}.",
        epilog="example: infinite-llm status --json | jq '.kvdaemons[].use'",
    )
    command.add_argument("--json", action="store_true", help="all fields, for programs")
    command.add_argument("--grpc-port", type=int, default=50051, help="of the gateway (default %(default)s)")


def _add_top(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "top",
        help="watch pools, instances, and who lends to whom",
        description=f"Shows its API key where there is one in {API_KEY_VARIABLE}.",
        epilog="example: infinite-llm top --interval 0.5",
    )
    command.add_argument("--address", default=f"{HOST}:50051", help="of a gateway's gRPC API (default %(default)s)")
    command.add_argument("--interval", type=float, default=1.0, metavar="S", help="default %(default)s")
    command.add_argument("--frames", type=int, metavar="N", help="end after so many (default: on Ctrl-C)")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "generate",
        help="send one prompt to a running cluster and print the answer as it comes",
        description=f"Shows its API key where there is one in {API_KEY_VARIABLE}.",
        epilog='example: infinite-llm generate "Once upon a time" --max-tokens 64 --temperature 0.8 --top-p 0.95',
    )
    command.add_argument("prompt", help="a text, or - for standard input")
    command.add_argument("--token-ids", action="store_true", help="the prompt is token ids, and so is the answer")
    command.add_argument("--address", default=f"{HOST}:50051", help="of a gateway's gRPC API (default %(default)s)")
    command.add_argument("--max-tokens", type=int, default=256, help="default %(default)s")
    command.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token (default)")
    command.add_argument("--seed", type=int, help="equal seeds draw equal tokens")
    command.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    command.add_argument("--top-p", type=float, help="draw from the most probable tokens that reach this probability")
    command.add_argument("--stop", nargs="+", metavar="TEXT", help="ends the answer")


def _generate(options: argparse.Namespace) -> int:
    sampling = SamplingOptions()
    for name in ("top_k", "top_p", "stop"):
        if (value := getattr(options, name)) is not None:
            sampling[name] = value
    return generate(
        options.address,
        os.environ.get(API_KEY_VARIABLE),
        read_prompt(options.prompt, options.token_ids),
        options.max_tokens,
        options.temperature,
        options.seed,
        sampling,
    )


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo",
        help="answer one prompt that is too long for any one process's memory",
        description="Builds the needle checkpoint, starts a cluster, and asks it for a needle in a haystack.",
        epilog="example: infinite-llm demo --oneshot --tokens 65536 --depth 0.9",
    )
    command.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="length of the prompt (default %(default)s)"
    )
    command.add_argument("--depth", type=float, default=0.37, help="of the needle, 0 to 1 (default %(default)s)")
    command.add_argument("--seed", type=int, default=1, help="chooses the haystack (default %(default)s)")
    command.add_argument("--oneshot", action="store_true", help="end after the answer; exit code 0 only if it is right")
    _add_places(command)


def _add_new_key(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "new-key",
        help="make an API key for gateways that ask for one (api_keys in their configuration)",
        description="Prints a new key, once; the file gets its hash.",
        epilog="example: infinite-llm new-key alice --file api-keys",
    )
    command.add_argument("name", help="of whoever gets the key, for the file and the logs")
    command.add_argument("--file", type=Path, required=True, help="the key's line is added to it")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="look for what would keep a cluster from running here, or from being fast",
        epilog="example: infinite-llm doctor --http-port 8080",
    )
    command.add_argument("--http-port", type=int, default=8000, help="that the gateway will use (default %(default)s)")
    command.add_argument("--grpc-port", type=int, default=50051, help="likewise (default %(default)s)")


def _new_key(name: str, file: Path) -> int:
    key, line = new_key(name)
    try:
        with file.open("a", encoding="utf-8") as keys:
            keys.write(line + "\n")
    except OSError as exc:
        raise ConfigError(f"--file {file}: cannot be written: {exc}") from exc
    print(key)
    return 0


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--http-port", type=int, default=8000, help="of the gateway, 0: any (default %(default)s)")
    command.add_argument("--grpc-port", type=int, default=50051, help="of the gateway, 0: any (default %(default)s)")
    command.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="for logs, sockets and data (default: a temporary one)"
    )


def _degrees(text: str) -> tuple[int, ...]:
    """Raises ValueError, as argparse wants it."""
    return tuple(int(part) for part in text.split(","))


def _cluster_options(options: argparse.Namespace) -> ClusterOptions:
    return ClusterOptions(
        model=options.model,
        gmanagers=options.gmanagers,
        instances=options.instances,
        tensor_parallel=options.tensor_parallel,
        kvdaemons=options.kvdaemons,
        pool_mib=options.pool_mib,
        dtype=options.dtype,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        device=options.device,
        memory_device=options.memory_device,
        transport=options.transport,
        link=options.link,
        max_model_len=options.max_model_len,
        overlay={} if options.config is None else read_overlay(options.config),
        run_dir=options.run_dir,
        start_timeout_s=options.start_timeout,
    )


def _demo_options(options: argparse.Namespace) -> DemoOptions:
    return DemoOptions(
        tokens=options.tokens,
        depth=options.depth,
        seed=options.seed,
        oneshot=options.oneshot,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        run_dir=options.run_dir,
    )


def read_overlay(path: Path) -> Mapping[str, Mapping[str, object]]:
    """A --config file: a mapping of services to mappings of keys.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"--config {path}: cannot be read: {exc}") from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path}: must be a mapping of services to their keys")
    for kind, keys in data.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"--config {path}: {kind} must be a mapping of keys to values")
    return data


if __name__ == "__main__":
    sys.exit(main())
