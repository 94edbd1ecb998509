"""The official ``openai`` client, as its users call it, against a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from gateway_rig import BYTES, Gateway, PlayedInstance, gateway, service, until, write_checkpoint

import infinitellm
from services.launcher.cli import main as cli
from services.runtime.api_keys import new_key
from services.runtime.etcd import EtcdClient

pytestmark = pytest.mark.cluster

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "né?"}]


@pytest.fixture
def served(etcd_endpoint: str, tmp_path: Path) -> Iterator[Gateway]:
    with (
        service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]),
        gateway(tmp_path, etcd_endpoint, write_checkpoint(tmp_path / "tiny")) as running,
    ):
        yield running


@asynccontextmanager
async def client_of(etcd: str, served: Gateway, api_key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    played = PlayedInstance("instance-0")
    store = EtcdClient([etcd])
    await played.start(store)
    async with openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key=api_key, max_retries=0, timeout=20) as client:

        async def ready() -> bool:
            try:
                await client.completions.create(model="tiny", prompt="a", max_tokens=1)
            except openai.InternalServerError:
                return False
            return True

        try:
            await until(ready, "the gateway is ready")
            yield client
        finally:
            await played.close()
            await store.close()


def test_without_a_key_nobody_gets_further(
    etcd_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line)

    async def scenario(served: Gateway) -> None:
        async with client_of(etcd_endpoint, served, api_key=key) as client:
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
            assert answer.usage is not None
            for wrong in ("none", key[:-1]):
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    await client.with_options(api_key=wrong).models.list()
            async with infinitellm.AsyncClient(served.grpc, api_key=key) as sdk:
                assert [event async for event in sdk.generate([1], max_tokens=1)]
                assert (await sdk.cluster_status()).models == ("tiny",)
            monkeypatch.setenv("INFINITE_LLM_API_KEY", key)
            asked = ["generate", "hi", "--address", served.grpc, "--max-tokens", "20", "--stop", "好"]
            assert await asyncio.to_thread(cli, asked) == 0
            printed = capsys.readouterr()
            assert printed.out == "né 🦙 你\n"
            assert "2 prompt tokens" in printed.err
            assert "15 tokens, stop" in printed.err
            ids = ["generate", "104 105", "--token-ids", "--address", served.grpc, "--max-tokens", "3"]
            assert await asyncio.to_thread(cli, ids) == 0
            assert (
                await asyncio.to_thread(cli, ["top", "--address", served.grpc, "--frames", "2", "--interval", "0.1"])
                == 0
            )
            assert capsys.readouterr().out.count("0 requests run, 0 wait") == 2
            monkeypatch.delenv("INFINITE_LLM_API_KEY")
            assert await asyncio.to_thread(cli, asked) == 1
            assert "API key" in capsys.readouterr().err
            async with infinitellm.AsyncClient(served.grpc) as sdk:
                with pytest.raises(infinitellm.errors.UnauthenticatedError, match="API key"):
                    await sdk.cluster_status()
                with pytest.raises(infinitellm.errors.UnauthenticatedError, match="API key"):
                    await anext(sdk.generate([1], max_tokens=1))

    with (
        service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]),
        gateway(
            tmp_path, etcd_endpoint, write_checkpoint(tmp_path / "tiny"), api_keys=str(tmp_path / "keys")
        ) as served,
    ):
        asyncio.run(scenario(served))
        assert httpx.get(f"{served.http}/version").status_code == 200
        refused = httpx.get(f"{served.http}/v1/models")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert key not in served.log.read_text()


def test_everything_an_application_calls(etcd_endpoint: str, served: Gateway) -> None:
    async def scenario() -> None:
        async with client_of(etcd_endpoint, served) as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]

            whole = await client.completions.create(model="tiny", prompt="hi", max_tokens=20, temperature=0, logprobs=1)
            assert whole.choices[0].text == BYTES.decode()
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 20

            text = ""
            stream = await client.completions.create(
                model="tiny", prompt="hi", max_tokens=20, temperature=0, top_p=0.9, stop=["never"], stream=True
            )
            async for piece in stream:
                text += piece.choices[0].text
            assert text == BYTES.decode()

            chat = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=1
            )
            assert chat.choices[0].message.content == BYTES.decode()
            assert chat.choices[0].logprobs is not None
            assert chat.choices[0].logprobs.content is not None
            assert len(chat.choices[0].logprobs.content) == 20

            text, usage = "", None
            chunks = await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=20,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in chunks:
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                usage = chunk.usage or usage
            assert text == BYTES.decode()
            assert usage is not None
            assert usage.completion_tokens == 20

            with pytest.raises(openai.NotFoundError, match="tiny"):
                await client.completions.create(model="other", prompt="a")
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                await client.completions.create(model="tiny", prompt="a", max_tokens=-1)

    asyncio.run(scenario())
