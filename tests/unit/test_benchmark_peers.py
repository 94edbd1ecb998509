"""What benchmarks measure servers with: their processes, their answers, their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoModelForCausalLM

from benchmarks.checkpoints import SHAPES, make_tokenizer, write_random_checkpoint
from benchmarks.mixed_load import MixedLoad
from benchmarks.peers.agreement import NEAR_TIE, Agreement, DisagreementError, Step, compare_steps
from benchmarks.peers.ours import our_command
from benchmarks.peers.processes import family
from benchmarks.peers.server import PinnedServer, ServerCommand, Serving
from benchmarks.peers.vllm import vllm_command
from benchmarks.pooled_vs_vllm import LOADS, SCALES, SHAPE, Scale
from services.core.errors import ConfigError, UnavailableError
from services.launcher.ports import free_ports

# Starts a child that works without end, writes which cores both run on, and answers /health with 200.
SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
with open(sys.argv[2], "w") as file:
    print(child.pid, sorted(os.sched_getaffinity(0)), os.environ["COLOUR"], file=file)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def command(tmp_path: Path, program: str = SERVER) -> ServerCommand:
    (port,) = free_ports(1)
    argv = (sys.executable, "-c", program, str(port), str(tmp_path / "told"))
    return ServerCommand("toy", "m", port, argv, {"COLOUR": "blue"})


def test_a_server_is_pinned_accounted_for_and_ended_with_all_it_has_started(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with PinnedServer(command(tmp_path), (core,), tmp_path / "log") as server:
        child, cores, colour = (tmp_path / "told").read_text().split(" ", 2)[0], f"[{core}]", "blue"
        assert (tmp_path / "told").read_text().split(" ", 1)[1].strip() == f"{cores} {colour}"
        before = server.processor_s()
        (busy,) = [process for process in before if process.pid == int(child)]
        deadline = time.monotonic() + 30
        while server.processor_s_since(before) < 0.05:  # the child's, for the server itself waits
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert busy.processor_s() - before[busy] >= 0.04
        processes = list(before)
    assert len(processes) == 2
    assert not any(process.alive() for process in processes)


def test_a_process_that_ends_voids_what_was_measured(tmp_path: Path) -> None:
    with PinnedServer(command(tmp_path), (min(os.sched_getaffinity(0)),), tmp_path / "log") as server:
        child = int((tmp_path / "told").read_text().split(" ")[0])
        (busy,) = [process for process in server.processor_s() if process.pid == child]
        busy.kill()
        deadline = time.monotonic() + 30
        while busy.alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UnavailableError, match=rf"processes \[{child}\] have ended"):
            server.processor_s_since(server.processor_s())


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    failing = command(tmp_path, "import sys; sys.exit('no memory left')")
    with (
        pytest.raises(UnavailableError, match=r"(?s)ended with exit code 1.*no memory left"),
        PinnedServer(failing, (0,), tmp_path / "log"),
    ):
        pass


def test_a_number_used_again_is_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (found,) = [process for process in family(os.getpid()) if process.pid == child.pid]
        assert found.alive()
        assert not replace(found, started=found.started + 1).alive()
        replace(found, started=found.started + 1).kill()
        assert child.poll() is None
        found.kill()
        assert child.wait(10) < 0


def step(token: int, logprob: float, **top: float) -> Step:
    return Step(token, f"t{token}", logprob, {f"t{token}": logprob, **top})


def test_equal_answers_agree() -> None:
    ours = [step(1, -1.0), step(2, -0.5)]
    assert compare_steps(ours, [step(1, -1.0 - NEAR_TIE / 2), step(2, -0.5)]) == Agreement(2, 0)
    assert Agreement(2, 0) + Agreement(1, 1) == Agreement(3, 1)


def test_answers_may_part_at_a_near_tie_and_then_say_anything() -> None:
    ours = [step(1, -1.0), step(2, -0.5, t3=-0.51), step(8, -0.1)]
    theirs = [step(1, -1.0), step(3, -0.5, t2=-0.52), step(9, -0.1)]
    assert compare_steps(ours, theirs) == Agreement(1, 1)


@pytest.mark.parametrize(
    ("our", "their"),
    [
        (step(2, -0.5, t3=-3.0), step(3, -0.5, t2=-0.51)),  # ours is sure of another token
        (step(2, -0.5, t3=-0.51), step(3, -0.5, t2=-3.0)),  # theirs is
        (step(2, -0.5), step(3, -0.5)),  # neither thinks of the other's
        (step(2, -0.5), step(2, -0.5 - 2 * NEAR_TIE)),  # the same token, with another probability
    ],
)
def test_other_answers_do_not_agree(our: Step, their: Step) -> None:
    with pytest.raises(DisagreementError):
        compare_steps([step(1, -1.0), our], [step(1, -1.0), their])


@pytest.mark.parametrize(("name", "millions"), [("llama-100m", (98, 102)), ("qwen2.5-0.5b", (490, 498))])
def test_shapes_have_the_size_that_their_names_say(name: str, millions: tuple[int, int]) -> None:
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].make_config())
    assert millions[0] < sum(parameter.numel() for parameter in model.parameters()) / 1e6 < millions[1]


def test_a_checkpoint_can_be_served(tmp_path: Path) -> None:
    small = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = replace(SHAPES["llama-100m"], settings={**SHAPES["llama-100m"].settings, **small, **heads})
    parameters = write_random_checkpoint(tmp_path / "a", shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["eos_token_id"], config["dtype"]) == (999, "bfloat16")
    write_random_checkpoint(tmp_path / "b", shape)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000


def test_every_token_has_a_text_of_its_own() -> None:
    tokenizer = make_tokenizer(1000)
    texts = [tokenizer.decode([token]) for token in range(256, 999)]
    assert len(set(texts)) == len(texts)
    assert all(text.startswith(" ") and text[1:].isalpha() for text in texts)
    assert tokenizer.decode(tokenizer.encode("né 🦙")) == "né 🦙"
    assert tokenizer.eos_token_id == 999


def test_both_servers_are_started_with_the_same(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "llama", (0,), 4096, 48, 512 << 20)
    python = tmp_path / "venv" / "bin" / "python"
    with pytest.raises(ConfigError, match="make peers"):
        vllm_command(serving, tmp_path / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    ours, vllm = our_command(serving, tmp_path), vllm_command(serving, tmp_path / "venv")
    assert ours.model == vllm.model == "llama"
    assert ours.port != vllm.port
    mine = dict(zip(ours.argv, ours.argv[1:], strict=False))
    other = dict(zip(vllm.argv, vllm.argv[1:], strict=False))
    assert mine["--model"] == other["--model"] == str(tmp_path / "llama")
    assert mine["--max-model-len"] == other["--max-model-len"] == "4096"
    assert (mine["--pool-mib"], other["--kv-cache-memory-bytes"]) == ("512", str(512 << 20))
    overlay = json.loads(Path(mine["--config"]).read_text())["instance"]
    assert str(overlay["max_num_seqs"]) == other["--max-num-seqs"] == "48"
    assert str(overlay["num_threads"]) == vllm.environment["OMP_NUM_THREADS"] == "1"


def test_two_instances_share_what_tensor_parallel_workers_share(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "llama", (0, 1), 4096, 48, 512 << 20)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    ours = our_command(serving, tmp_path, instances=2)
    vllm = vllm_command(serving, tmp_path / "venv", tensor_parallel=True)
    mine = dict(zip(ours.argv, ours.argv[1:], strict=False))
    other = dict(zip(vllm.argv, vllm.argv[1:], strict=False))
    assert mine["--instances"] == other["--tensor-parallel-size"] == "2"
    assert (mine["--pool-mib"], other["--kv-cache-memory-bytes"]) == ("256", str(256 << 20))
    overlay = json.loads(Path(mine["--config"]).read_text())["instance"]
    assert str(overlay["num_threads"]) == vllm.environment["OMP_NUM_THREADS"] == "1"
    assert vllm.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    with pytest.raises(ConfigError, match="each of 2 instances"):
        our_command(Serving(tmp_path / "llama", (0, 1), 4096, 48, 1 << 20), tmp_path, instances=2)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_a_load_has_the_same_lengths_and_other_prompts_each_time(load: MixedLoad, scale: Scale) -> None:
    pool_tokens = scale.pool_tokens
    one, two = (load.draw(SHAPE, 96, pool_tokens, scale.outputs, seed) for seed in "ab")
    totals = [len(ask.prompt) + ask.output_tokens for ask in one]
    assert totals == [len(ask.prompt) + ask.output_tokens for ask in two]
    assert not {ask.prompt for ask in one} & {ask.prompt for ask in two}
    assert max(totals) == int(load.longest * pool_tokens)
    assert max(totals) <= SHAPE.settings["max_position_embeddings"]
    long_ones = sum(total >= load.long_from * pool_tokens for total in totals)
    assert long_ones == round(load.long_share * 96)
