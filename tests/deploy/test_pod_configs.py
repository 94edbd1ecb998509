"""What the services will read in their pods: loaded by their own loaders, and compared with the pod around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from manifests import OVERLAYS, ROOT, Document, Pod, config_files, cores, mib, named, of_kind, overlay, pods

from services.core.errors import ConfigError
from services.gateway.config import GatewayConfig
from services.gmanager.config import GManagerConfig
from services.instance.config import InstanceConfig
from services.kvdaemon.config import KvDaemonConfig
from services.runtime.addresses import split_address
from services.runtime.config import IDENTITY_VARIABLES, load_config
from services.runtime.tls import MutualTls

AnyConfig = GatewayConfig | GManagerConfig | InstanceConfig | KvDaemonConfig
ON_DEVICE = InstanceConfig | KvDaemonConfig
LOADERS: dict[str, type[AnyConfig]] = {
    "services.gateway": GatewayConfig,
    "services.gmanager": GManagerConfig,
    "services.instance": InstanceConfig,
    "services.kvdaemon": KvDaemonConfig,
}
MPS_DIRECTORY = "/run/nvidia-mps"  # CUDA_MPS_PIPE_DIRECTORY of the image
SETTINGS = Path("/etc/infinite-llm/config")
IDENTITY = {"POD_NAME": "pod-0", "POD_IP": "10.1.2.3", "NODE_NAME": "node-1"}
PROCESS_MIB = 512  # what a daemon's process takes besides its pool, at least
PRE_STOP_MARGIN_S = 10  # journal, lease, channels


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> tuple[Document, ...]:
    return overlay(request.param)


@pytest.fixture
def loaded(
    documents: tuple[Document, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Pod, Document, AnyConfig]]:
    """Every service's container with its configuration; its environment is what the manifest gives it."""
    for name in IDENTITY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = []
    for pod in pods(documents):
        for container in pod.containers:
            module = container.get("args", [""])[0]
            if module not in LOADERS:
                continue
            assert container["args"][1:] == ["--config", str(SETTINGS)]
            directory = tmp_path / f"{pod.name}-{container['name']}"
            directory.mkdir()
            for name, text in config_files(documents, pod, container).items():
                (directory / name).write_text(text)
            for variable in container["env"]:
                assert variable["name"] in IDENTITY_VARIABLES, "configuration comes from files"
                monkeypatch.setenv(variable["name"], IDENTITY[variable["name"]])
            found.append((pod, container, load_config(LOADERS[module], directory)))
            (directory / "99-wrong.yaml").write_text("pool_mbi: 1\n")
            with pytest.raises(ConfigError, match="unknown key pool_mbi"):
                load_config(LOADERS[module], directory)
    return found


def test_every_service_is_there_and_has_its_own_identity(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    assert sorted(f"{pod.name}/{container['name']}" for pod, container, _ in loaded) == [
        *("gateway/gateway", "gmanager/gmanager", "instance/instance", "instance/kvdaemon", "kvdaemon/kvdaemon")
    ]
    assert all(config.member_id == "pod-0" for _, _, config in loaded)
    assert len({config.cluster for _, _, config in loaded}) == 1


def test_ports_are_those_of_the_configuration(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    for _, container, config in loaded:
        assert config.health_listen is not None
        listening = {split_address(config.health_listen)[1]}
        probed = {container[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "liveness", "readiness")}
        assert probed == listening
        if not isinstance(config, GatewayConfig):
            assert config.metrics_listen is not None
            host, port = split_address(config.metrics_listen)
            assert host == "10.1.2.3"  # what Prometheus is told
            (named,) = (port["containerPort"] for port in container["ports"] if port["name"].endswith("metrics"))
            assert named == port
            listening.add(port)
        if isinstance(config, GatewayConfig):
            listening |= {split_address(config.http_listen)[1], split_address(config.grpc_listen)[1]}
            assert config.advertise == f"10.1.2.3:{split_address(config.grpc_listen)[1]}"
        else:
            host, port = split_address(config.listen)
            assert host == "10.1.2.3"  # what is listened on is what the others are told
            listening.add(port)
        if isinstance(config, KvDaemonConfig):
            assert config.transports == ("auto",)
            host, port = split_address(config.dataplane_listen)
            assert host == "10.1.2.3"
            listening |= {port, port + 1}  # tcp, and rdma where there is an adapter
        assert {port["containerPort"] for port in container["ports"]} == listening


def test_an_instance_finds_its_daemon(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    pod = next(pod for pod, _, _ in loaded if pod.name == "instance")
    daemon, instance = (config for owner, _, config in loaded if owner.name == "instance")
    assert isinstance(daemon, KvDaemonConfig)
    assert isinstance(instance, InstanceConfig)
    assert instance.local_kvdaemon_id == daemon.member_id
    assert instance.socket_dir == daemon.socket_dir
    assert instance.transport == "auto"
    shared = [
        {mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == str(daemon.socket_dir)}
        for container in pod.containers
    ]
    assert shared == [{"sockets"}, {"sockets"}]
    # A socket may be used by its owner alone.
    assert all("runAsUser" not in container["securityContext"] for container in pod.containers)


def test_an_instance_and_its_daemon_share_a_device(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    """On a GPU both containers have it, see each other's processes, and find the socket of the MPS beside them."""
    pod = next(pod for pod, _, _ in loaded if pod.name == "instance")
    containers = {name: container for owner, container, _ in loaded if owner is pod for name in [container["name"]]}
    devices = {config.device for owner, _, config in loaded if owner is pod and isinstance(config, ON_DEVICE)}
    assert len(devices) == 1
    lenders = [config for owner, _, config in loaded if owner.name == "kvdaemon" and isinstance(config, KvDaemonConfig)]
    assert [lender.device for lender in lenders] == ["cpu"]
    on_gpu = devices != {"cpu"}
    assert bool(pod.spec.get("shareProcessNamespace")) is on_gpu
    (*beside,) = (container for container in pod.spec.get("initContainers", ()) if container["name"] == "mps")
    assert bool(beside) is on_gpu
    for container in (*containers.values(), *beside):
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is on_gpu
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.get("mps") == (MPS_DIRECTORY if on_gpu else None)
        assert ("runAsUser" in container["securityContext"]) is False, "MPS serves one user"
    for server in beside:
        assert server["restartPolicy"] == "Always"  # it runs beside the others, and before them
        assert server["startupProbe"]["exec"]["command"] == ["test", "-p", f"{MPS_DIRECTORY}/control"]
    dockerfile = (ROOT / "deploy" / "docker" / "engine.Dockerfile").read_text()
    assert f"CUDA_MPS_PIPE_DIRECTORY={MPS_DIRECTORY}" in dockerfile


def test_memory_and_threads_fit_the_container(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    for pod, container, config in loaded:
        requests = container["resources"]["requests"]
        if isinstance(config, KvDaemonConfig):
            in_host_memory = config.pool_mib if config.device == "cpu" else 0
            assert mib(requests["memory"]) >= in_host_memory + PROCESS_MIB, pod.name
            assert requests["memory"] == container["resources"]["limits"]["memory"], "a pool is taken in full"
        if isinstance(config, KvDaemonConfig | InstanceConfig) and cores(requests["cpu"]) >= 1:
            assert config.num_threads <= cores(requests["cpu"]), pod.name


def test_checkpoints_are_mounted_where_they_are_looked_for(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    models = [(pod, c, config.model) for pod, c, config in loaded if isinstance(config, GatewayConfig | InstanceConfig)]
    assert len({model for _, _, model in models}) == 1
    for pod, container, model in models:
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        mount = mounts[str(model.parent)]
        assert mount["readOnly"] is True
        volume = next(volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
        if "emptyDir" in volume:
            (builder,) = pod.spec["initContainers"]
            assert builder["args"][:2] == ["services.launcher.needle_model", str(model)]
            assert str(model.parent) in [own["mountPath"] for own in builder["volumeMounts"]]
        else:
            assert volume["persistentVolumeClaim"]["readOnly"] is True


def test_grace_periods_cover_the_services_own_shutdown(loaded: list[tuple[Pod, Document, AnyConfig]]) -> None:
    for pod, container, config in loaded:
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        needed = PRE_STOP_MARGIN_S
        if isinstance(config, GatewayConfig):
            pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert pre_stop_s >= container["readinessProbe"]["periodSeconds"]
            needed += pre_stop_s + config.shutdown_grace_s
        if isinstance(config, InstanceConfig):
            needed += config.call_timeout_s
        assert grace_s > needed, pod.name


def test_state_is_where_the_services_look_for_it(documents: tuple[Document, ...], loaded: list[object]) -> None:
    for _, _, config in loaded:  # type: ignore[misc]
        for endpoint in config.etcd:
            _check_endpoint(documents, endpoint)
        if isinstance(config, GatewayConfig):
            assert config.redis_url is not None
            _check_endpoint(documents, config.redis_url.removeprefix("redis://").partition("/")[0])


def test_spans_go_to_the_collector_where_there_is_one(
    documents: tuple[Document, ...], loaded: list[tuple[Pod, Document, AnyConfig]]
) -> None:
    collectors = [pod for pod in pods(documents) if pod.name == "otel-collector"]
    assert all((config.tracing is not None) is bool(collectors) for _, _, config in loaded)
    for _, _, config in loaded:
        if config.tracing is not None:
            _check_endpoint(documents, config.tracing.endpoint.removeprefix("http://"))
            assert 0 < config.tracing.sampling_ratio < 1
    for collector in collectors:
        (container,) = collector.containers
        (volume,) = collector.spec["volumes"]
        files = named(documents, "ConfigMap", collector.namespace, volume["configMap"]["name"])["data"]
        path = Path(container["args"][0].removeprefix("--config="))
        assert path.parent == Path(container["volumeMounts"][0]["mountPath"])
        settings = yaml.safe_load(files[path.name])
        ports = {port["containerPort"] for port in container["ports"]}
        told = (settings["receivers"]["otlp"]["protocols"]["grpc"], settings["extensions"]["health_check"])
        assert {split_address(part["endpoint"])[1] for part in told} == ports
        (pipeline,) = settings["service"]["pipelines"].values()
        for kind, names in pipeline.items():
            assert set(names) == settings[kind].keys()


def _check_endpoint(documents: tuple[Document, ...], endpoint: str) -> None:
    """[POD.]SERVICE.NAMESPACE.svc:PORT, the pod one of a StatefulSet's."""
    host, port = split_address(endpoint)
    *pod, name, namespace, svc = host.split(".")
    assert svc == "svc"
    service = named(documents, "Service", namespace, name)
    assert port in [entry["port"] for entry in service["spec"]["ports"]]
    if pod:
        assert service["spec"]["clusterIP"] == "None"
        workload, _, ordinal = pod[0].rpartition("-")
        stateful = named(documents, "StatefulSet", namespace, workload)
        assert stateful["spec"]["serviceName"] == name
        assert int(ordinal) < stateful["spec"]["replicas"]


def test_with_tls_each_container_has_its_own_certificate(
    documents: tuple[Document, ...], loaded: list[tuple[Pod, Document, AnyConfig]]
) -> None:
    certificates = {document["spec"]["secretName"]: document for document in of_kind(documents, "Certificate")}
    assert all((config.tls is not None) is bool(certificates) for _, _, config in loaded)
    for pod, container, config in loaded:
        if config.tls is None:
            continue
        assert config.etcd_tls is not None
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == str(config.tls.cert.parent)]
        volume = next(volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
        names = certificates[volume["secret"]["secretName"]]["spec"]["dnsNames"]
        assert config.tls.roles_of(names) == {container["name"]}
        assert f"member.{config.tls.domain}" in names


def test_clients_of_the_api_cannot_open_etcd() -> None:
    documents = overlay("production")
    etcd = next(pod for pod in pods(documents) if pod.name == "etcd").containers[0]["args"]
    names = {d["metadata"]["name"]: d["spec"].get("dnsNames", []) for d in of_kind(documents, "Certificate")}
    required = next(arg for arg in etcd if arg.startswith("--client-cert-allowed-hostname=")).partition("=")[2]
    assert sorted(name for name, own in names.items() if required in own) == [
        *("etcd", "gateway", "gmanager", "instance", "kvdaemon")
    ]
    peers = next(arg for arg in etcd if arg.startswith("--peer-cert-allowed-hostname=")).partition("=")[2]
    assert [name for name, own in names.items() if peers in own] == ["etcd"]
    some = Path("/x")
    assert MutualTls(some, some, some).roles_of(names["client"]) == {"client"}
    hosts = {f"etcd-{member}.etcd.infinite-llm.svc" for member in range(3)}
    assert hosts <= set(names["etcd"])
