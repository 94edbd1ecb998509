"""A real Prometheus with the monitoring component's configuration and rules, that scrapes a cluster on this machine."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from cluster_process import Cluster
from prometheus_tools import prometheus_tool

from services.launcher.ports import free_ports

CONFIG = Path(__file__).parents[3] / "deploy" / "k8s" / "components" / "monitoring" / "config"
START_TIMEOUT_S = 30.0

Sample = tuple[dict[str, str], float]


class PrometheusProcess:
    """Runs from ``start`` to ``stop``.

    Of the deployed configuration it changes addresses, which are not this machine's, and intervals: every second.
    """

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self._binary = prometheus_tool("prometheus")
        self._directory = directory
        self._config = _config(cluster)
        self._process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{free_ports(1)[0]}", timeout=20)

    def start(self) -> None:
        file = self._directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(self._config))
        command = [
            self._binary,
            f"--config.file={file}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--web.listen-address={self.http.base_url.host}:{self.http.base_url.port}",
        ]
        with (self._directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def stop(self) -> None:
        self.http.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def log(self) -> str:
        return (self._directory / "prometheus.log").read_text()[-3000:]

    def query(self, expr: str) -> list[Sample]:
        """The series of an instant query, which must be valid."""
        response = self.http.post("/api/v1/query", data={"query": expr})
        body: dict[str, Any] = response.json()
        assert (response.status_code, body["status"]) == (200, "success"), f"{expr}\n{body}"
        result = body["data"]["result"]
        assert body["data"]["resultType"] == "vector", expr
        return [(sample["metric"], float(sample["value"][1])) for sample in result]

    def rules(self) -> list[dict[str, Any]]:
        """All rules as it has loaded and evaluated them."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def _config(cluster: Cluster) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG / "*.rules.yml")]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for discovery in jobs["infinite-llm"]["http_sd_configs"]:
        discovery |= {"url": f"http://127.0.0.1:{cluster.http_port}/metrics/targets", "refresh_interval": "1s"}
    del jobs["etcd"]["dns_sd_configs"]
    (client,) = [word for word in _command("etcd", cluster) if word.startswith("--listen-client-urls=")]
    jobs["etcd"]["static_configs"] = [{"targets": [client.rpartition("/")[2]]}]
    return config


def _command(member: str, cluster: Cluster) -> list[str]:
    return Path(f"/proc/{cluster.pid(member)}/cmdline").read_text().split("\0")
