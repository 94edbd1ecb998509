"""A gateway under test: real etcd, gManager and gateway processes, and instances that are played.

``PlayedInstance`` speaks InstanceService as an engine does, but draws its tokens from a formula, so that every test
knows the right answer: token i depends on (temperature, seed, i) alone, whoever computes it. It runs in the test's
event loop, or as a process of its own (``python tests/cluster/gateway_rig.py``) that can be killed and stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from byte_tokenizer import EOS, write_byte_tokenizer

from infinitellm.internal.v1 import instance_pb2, instance_pb2_grpc
from services.launcher.ports import free_ports
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_server import bind, make_server
from services.runtime.membership import Member, Membership

CLUSTER = "test"
VOCAB = 257
MAX_MODEL_LEN = 10_000
# Every token is one byte, so most characters are spread over several tokens.
TEXT = "né 🦙 你好 — "
BYTES = TEXT.encode()
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
START_TIMEOUT_S = 30.0
PLAYED_CHUNK = 3  # tokens of a prompt whose log-probabilities come at once


def played_logprobs(into, token: int, count: int, logprob: float) -> None:
    """Adds those of one position: the token and those behind it, each 1 less than the one before."""
    tops = [(token + step) % 256 for step in range(count)]
    into.add(logprob=logprob, top_ids=tops, top_logprobs=[logprob - step for step in range(count)])


def expected_token(index: int, temperature: float, seed: int) -> int:
    """Token ``index`` of every answer."""
    if temperature == 0:
        return BYTES[index % len(BYTES)]
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=1)
    return digest.digest()[0]


def expected_tokens(count: int, temperature: float = 0, seed: int = 0) -> list[int]:
    return [expected_token(index, temperature, seed) for index in range(count)]


@dataclass
class Script:
    """How a played instance behaves, from now on.

    Attributes:
        delay_s: before each token.
        eos_at: the token with this index is the end-of-sequence token, where the request stops at it.
        fail: reason and message that every new request is answered with.
        silent: says nothing any more, not even that it is alive.
        progress: number of progress events before the first token.
        text: what it says instead of the formula's tokens; the end-of-sequence token follows.
    """

    delay_s: float = 0.0
    eos_at: int | None = None
    fail: tuple[str, str] | None = None
    silent: bool = False
    progress: int = 0
    text: bytes | None = None


@dataclass
class PlayedInstance(instance_pb2_grpc.InstanceServiceServicer):
    """One instance; ``start`` serves and registers it."""

    instance_id: str
    script: Script = field(default_factory=Script)
    submitted: list[instance_pb2.SubmitRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def start(self, etcd: EtcdClient, max_model_len: int = MAX_MODEL_LEN) -> None:
        self.server = make_server()
        instance_pb2_grpc.add_InstanceServiceServicer_to_server(self, self.server)
        address = bind(self.server, "127.0.0.1:0")
        await self.server.start()
        member = Member("instance", self.instance_id, address, "m", max_model_len, epoch=time.time_ns())
        self.registration = await Membership(etcd, CLUSTER).register(member, ttl_s=5)

    async def die(self) -> None:
        """As SIGKILL would: the connections break; the membership key stays for a while."""
        await self.server.stop(grace=0)

    async def close(self) -> None:
        await self.registration.close()
        await self.server.stop(grace=0)

    async def Serve(self, request_iterator, context) -> AsyncIterator[instance_pb2.ServeResponse]:
        outgoing: asyncio.Queue[instance_pb2.ServeResponse] = asyncio.Queue()
        running: dict[str, asyncio.Task[None]] = {}
        tasks = [
            asyncio.create_task(self._read(request_iterator, outgoing, running)),
            asyncio.create_task(self._keep_alive(outgoing)),
        ]
        try:
            while True:
                response = await outgoing.get()
                if self.script.silent:
                    await asyncio.Event().wait()
                yield response
        finally:
            for task in (*tasks, *running.values()):
                task.cancel()

    async def _keep_alive(self, outgoing) -> None:
        while True:
            outgoing.put_nowait(instance_pb2.ServeResponse())
            await asyncio.sleep(0.2)

    async def _read(self, request_iterator, outgoing, running) -> None:
        first = True
        async for message in request_iterator:
            kind = message.WhichOneof("request")
            assert (kind == "hello") == first
            first = False
            if kind == "submit":
                self.submitted.append(message.submit)
                running[message.submit.request_id] = asyncio.create_task(self._compute(message.submit, outgoing))
            elif kind == "abort":
                self.aborted.append(message.abort.request_id)
                if task := running.get(message.abort.request_id):
                    task.cancel()

    async def _compute(self, submit: instance_pb2.SubmitRequest, outgoing) -> None:
        script, request_id = self.script, submit.request_id
        if script.fail is not None:
            failed = instance_pb2.RequestFailed(request_id=request_id, reason=script.fail[0], message=script.fail[1])
            outgoing.put_nowait(instance_pb2.ServeResponse(failed=[failed]))
            return
        if submit.progress:
            for step in range(1, script.progress + 1):
                progress = instance_pb2.RequestProgress(
                    request_id=request_id,
                    computed_tokens=step * submit.prompt_tokens // script.progress,
                    total_tokens=submit.prompt_tokens,
                )
                outgoing.put_nowait(instance_pb2.ServeResponse(progress=[progress]))
        for first in range(1, submit.prompt_tokens if submit.prompt_logprobs else 1, PLAYED_CHUNK):
            await asyncio.sleep(script.delay_s)
            scored = instance_pb2.StepPromptLogprobs(request_id=request_id, first=first)
            for index in range(first, min(first + PLAYED_CHUNK, submit.prompt_tokens)):
                played_logprobs(scored.logprobs, submit.token_ids[index], submit.prompt_logprobs, -index)
            outgoing.put_nowait(instance_pb2.ServeResponse(prompt_logprobs=[scored]))
        reason = "length"
        if submit.max_tokens == 0:
            finished = instance_pb2.RequestFinished(request_id=request_id, reason=reason)
            outgoing.put_nowait(instance_pb2.ServeResponse(finished=[finished]))
        for index in range(len(submit.token_ids) - submit.prompt_tokens, submit.max_tokens):
            await asyncio.sleep(script.delay_s)
            token = expected_token(index, submit.temperature, submit.seed)
            end = script.eos_at
            if script.text is not None:
                end = len(script.text)
                token = script.text[index] if index < end else token
            if index == end and EOS in submit.stop_token_ids:
                token, reason = EOS, "stop"
            tokens = instance_pb2.StepTokens(request_id=request_id, ids=[token], cached_tokens=2)
            if submit.logprobs:
                played_logprobs(tokens.logprobs, token, submit.logprobs, -0.5)
            response = instance_pb2.ServeResponse(tokens=[tokens])
            if reason == "stop" or index == submit.max_tokens - 1:
                response.finished.add(request_id=request_id, reason=reason)
            outgoing.put_nowait(response)
            if reason == "stop":
                return


def write_checkpoint(directory: Path, tokenizer: bool = True) -> Path:
    """A checkpoint as far as a gateway looks at it: JSON files and a byte-level tokenizer, no weights."""
    directory.mkdir(parents=True)
    config = {"vocab_size": VOCAB, "max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": 3}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 255]}))
    if tokenizer:
        write_byte_tokenizer(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return directory


@contextmanager
def service(kind: str, directory: Path, **config: object) -> Iterator[subprocess.Popen[bytes]]:
    """One service process, with its log in ``directory``; ended with SIGTERM and expected to end well."""
    path = directory / f"{kind}.yaml"
    path.write_text(json.dumps({"cluster": CLUSTER, "member_id": f"{kind}-0", **config}))  # JSON is YAML
    with (directory / f"{kind}.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", f"services.{kind}", "--config", str(path)], stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    http: str
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def gateway(directory: Path, etcd: str, checkpoint: Path, **config: object) -> Iterator[Gateway]:
    """A gateway that answers; whether it is ready depends on the instances."""
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports(2))
    keys = {"http_listen": http, "grpc_listen": grpc, "etcd": [etcd], "model": str(checkpoint), **config}
    with service("gateway", directory, **keys) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                httpx.get(f"http://{http}/version", timeout=2)
                break
            except httpx.TransportError:
                log = directory / "gateway.log"
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield Gateway(f"http://{http}", grpc, process, directory / "gateway.log")


async def until(condition, what: str, timeout_s: float = 20.0) -> None:
    """Waits until ``condition()``, or what it awaits, is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.02)


@contextmanager
def instance_process(instance_id: str, etcd: str, delay_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A played instance in a process of its own, for SIGKILL and SIGSTOP."""
    command = [sys.executable, __file__, instance_id, etcd, str(delay_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("instance_id")
    parser.add_argument("etcd")
    parser.add_argument("delay_s", type=float)
    arguments = parser.parse_args()
    instance = PlayedInstance(arguments.instance_id, Script(delay_s=arguments.delay_s))
    await instance.start(EtcdClient([arguments.etcd]))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
