"""KV and attention between real processes over the tcp data plane, in plain text and with certificates."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from authority import Authority, mutual_tls
from cluster_process import Cluster
from random_llama import VOCAB_SIZE, write_random_llama

from services.dataplane.select import connecting_transport
from services.dataplane.transport import Connected, Event, Limits, Lost
from services.runtime.tls import MutualTls

PROMPT = random.Random(1).choices(range(VOCAB_SIZE), k=1500)
TOKENS = 64
LIMITS = Limits(1 << 10, 1 << 12)
DEADLINE_S = 30.0


def first_event(address: str, tls: MutualTls | None) -> Event:
    """What a connection begins with."""
    transport = connecting_transport("tcp", None, tls)
    try:
        connection = transport.connect(address, b"", LIMITS)
        connection.send([b"before anybody has been asked"])
        deadline = time.monotonic() + DEADLINE_S
        while not (events := transport.poll(1.0)):
            assert time.monotonic() < deadline
        return events[0]
    finally:
        transport.close()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_kv_over_three_daemons_with_certificates(tmp_path: Path) -> None:
    """A context that three small pools hold together: the tokens are those of a cluster in plain text, and nobody gets
    at a daemon's data plane without the certificate of an instance or a daemon."""
    model, authority = tmp_path / "model", Authority()
    write_random_llama(model, logit_scale=4.0)  # answers without a near-tie
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "2", "--dtype", "float32", "--transport", "tcp")
    engine = {"max_batch_tokens": 128, "max_num_seqs": 4}

    with Cluster(model, tmp_path / "plain", *arguments, config={"instance": engine}) as cluster:
        expected = cluster.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids

    identities: dict[str, MutualTls] = {
        role: mutual_tls(tmp_path / role, authority, f"{role}.infinite-llm")
        for role in ("gateway", "gmanager", "instance", "kvdaemon")
    }
    config: dict[str, dict[str, object]] = {
        role: {"tls": {"ca": str(tls.ca), "cert": str(tls.cert), "key": str(tls.key)}}
        for role, tls in identities.items()
    }
    config["instance"] |= engine
    with Cluster(model, tmp_path / "tls", *arguments, config=config) as cluster:
        addresses = data_addresses(tmp_path / "tls")
        assert len(addresses) == 3
        answer = cluster.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.token_ids == expected, cluster.logs()
        for address in addresses:
            plain = first_event(address, None)
            assert isinstance(plain, Lost)
            assert "the peer speaks TLS" in plain.reason
            stranger = first_event(address, identities["gateway"])
            assert isinstance(stranger, Lost)
            assert "does not let in the role" in stranger.reason
            assert isinstance(first_event(address, identities["instance"]), Connected)
        log = cluster.logs()
        assert "the peer does not speak TLS" in log
        assert "the data plane is for instance.infinite-llm or kvdaemon.infinite-llm, not for gateway" in log


def data_addresses(run_dir: Path) -> list[str]:
    """Of all daemons' tcp data planes, from their logs."""
    lines = [line for path in run_dir.rglob("kvdaemon-*.log") for line in path.read_text().splitlines()]
    return [address for line in lines if '"data_addresses"' in line for address in json.loads(line)["data_addresses"]]
