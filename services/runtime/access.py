"""Who may call what, where callers prove who they are (mutual TLS). What is not listed, nobody may call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.core.errors import PermissionDeniedError
from services.runtime.tls import MutualTls, Role

_INTERNAL = "/infinitellm.internal.v1"
_PUBLIC = "/infinitellm.v1"

CALLERS: Mapping[str, frozenset[Role]] = {
    f"{_INTERNAL}.GManagerService/Heartbeat": frozenset({"instance", "kvdaemon"}),
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


def check_caller(tls: MutualTls, method: str, auth_context: Mapping[str, Iterable[bytes]]) -> None:
    """Refuses a call that its caller's role may not make.

    Args:
        method: full name, "/package.Service/Method".
        auth_context: what gRPC says of the connection's other side; its names were verified with the certificate.

    Raises:
        PermissionDeniedError: the caller has none of the roles that may.
    """
    names = [name.decode(errors="replace") for name in auth_context.get("peer_dns", ())]
    allowed = CALLERS.get(method, frozenset())
    if not allowed & tls.roles_of(names):
        who = ", ".join(names) or "a certificate without DNS names"
        wanted = " or ".join(sorted(tls.name_of(role) for role in allowed)) or "nobody"
        raise PermissionDeniedError(f"{method} is for {wanted}, not for {who}")
