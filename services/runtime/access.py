"""Who may call what, and who may connect to whose data plane, where callers prove who they are (mutual TLS). What is
not listed, nobody may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.core.errors import PermissionDeniedError
from services.runtime.tls import MutualTls, Role

_INTERNAL = "/infinitellm.internal.v1"
_PUBLIC = "/infinitellm.v1"

CALLERS: Mapping[str, frozenset[Role]] = {
    f"{_INTERNAL}.GManagerService/Heartbeat": frozenset({"instance", "kvdaemon"}),
    f"{_INTERNAL}.GManagerService/RelayHeartbeats": frozenset({"kvdaemon"}),
    f"{_INTERNAL}.HeartbeatRelayService/Heartbeat": frozenset({"instance", "kvdaemon"}),
    f"{_INTERNAL}.GManagerService/FindRoom": frozenset({"instance"}),
    f"{_INTERNAL}.GManagerService/WatchInstances": frozenset({"gateway"}),
    f"{_INTERNAL}.GManagerService/GetClusterView": frozenset({"gateway"}),
    f"{_INTERNAL}.InstanceService/Serve": frozenset({"gateway"}),
    f"{_INTERNAL}.InstanceService/MoveBlocks": frozenset({"gmanager"}),
    f"{_INTERNAL}.KvDaemonService/Session": frozenset({"instance"}),
    f"{_INTERNAL}.KvDaemonService/Reserve": frozenset({"instance"}),
    f"{_INTERNAL}.KvDaemonService/Attach": frozenset({"instance"}),
    f"{_INTERNAL}.KvDaemonService/Seal": frozenset({"instance"}),
    f"{_INTERNAL}.KvDaemonService/Release": frozenset({"instance"}),
    f"{_INTERNAL}.KvDaemonService/GetPool": frozenset({"instance", "gmanager"}),
    f"{_PUBLIC}.InferenceService/Generate": frozenset({"client"}),
    f"{_PUBLIC}.InferenceService/Resume": frozenset({"client"}),
    f"{_PUBLIC}.ClusterService/GetClusterStatus": frozenset({"client"}),
}

# The data plane carries KV and queries: daemons listen; instances connect to them, and daemons that copy blocks.
DATA_LISTENER: Role = "kvdaemon"
DATA_CALLERS: frozenset[Role] = frozenset({"instance", "kvdaemon"})


def check_caller(tls: MutualTls, method: str, auth_context: Mapping[str, Iterable[bytes]]) -> None:
    """Refuses a call that its caller's role may not make.

    Args:
        method: full name, "/package.Service/Method".
        auth_context: what gRPC says of the connection's other side; its names were verified with the certificate.

    Raises:
        PermissionDeniedError: the caller has none of the roles that may.
    """
    names = [name.decode(errors="replace") for name in auth_context.get("peer_dns", ())]
    _check(tls, method, CALLERS.get(method, frozenset()), names)


def check_data_caller(tls: MutualTls, dns_names: Iterable[str]) -> None:
    """Refuses who connects to a data plane and has none of the roles for it.

    Args:
        dns_names: of the other side's certificate, which has been verified.

    Raises:
        PermissionDeniedError: its role may not connect.
    """
    _check(tls, "the data plane", DATA_CALLERS, list(dns_names))


def _check(tls: MutualTls, what: str, allowed: frozenset[Role], names: list[str]) -> None:
    if not allowed & tls.roles_of(names):
        who = ", ".join(names) or "a certificate without DNS names"
        wanted = " or ".join(sorted(tls.name_of(role) for role in allowed)) or "nobody"
        raise PermissionDeniedError(f"{what} is for {wanted}, not for {who}")
