"""Which transport a pair of processes uses: the best that both have.

Whoever listens *offers* its addresses, and who connects takes the first of its own schemes, best first, that is among
them. So nobody need be told who is where: a daemon on the same host is reached over shared memory, another one over
RDMA or TCP.

Shared memory needs proof that both are on one host, and see the same directory: names of hosts, paths and process ids
repeat from one container to the next. What does not is the kernel's boot id, one for all containers of a machine,
together with device and inode of the socket's file. Who finds the same file at the offered path may connect to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ConfigError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Offers:
    """How a daemon can be reached.

    Attributes:
        addresses: of its data planes, schemes included.
        socket_identity: of the shm address's socket, as ``socket_identity`` says; empty where it offers no shm.
    """

    addresses: tuple[str, ...] = ()
    socket_identity: str = ""

    def address(self, scheme: str) -> str | None:
        """Where its data plane of this scheme listens; None where it has none."""
        return next((address for address in self.addresses if address.startswith(f"{scheme}:")), None)

    def pack(self) -> str:
        """One address a line, then an empty line and the identity, if there is one."""
        identity = f"\n\n{self.socket_identity}" if self.socket_identity else ""
        return "\n".join(self.addresses) + identity


def unpack_offers(text: str) -> Offers:
    """The inverse of ``Offers.pack``."""
    addresses, _, identity = text.partition("\n\n")
    return Offers(tuple(addresses.split("\n")), identity)


def socket_identity(path: Path) -> str:
    """What tells the socket at this path from every other one of every machine; empty where this process sees none."""
    try:
        file = os.stat(path)
        return f"{_BOOT_ID.read_text().strip()}/{file.st_dev}/{file.st_ino}"
    except OSError:
        return ""


def choose_address(own: Sequence[str], offers: Offers) -> str:
    """Where to connect.

    Args:
        own: schemes that this process can connect over, best first.

    Raises:
        ConfigError: no scheme will do.
    """
    for scheme in own:
        address = offers.address(scheme)
        if address is not None and (scheme != "shm" or _leads_to(address, offers.socket_identity)):
            return address
    offered = ", ".join(address.partition(":")[0] for address in offers.addresses) or "nothing"
    local = offers.address("shm") if "shm" in own else None
    hint = f"; {local} is not that daemon's socket here: another host, directory or user" if local else ""
    raise ConfigError(
        f"no common transport: this process connects over {', '.join(own)}, the daemon offers {offered}{hint}. "
        "Let both name one (instance config: transport, kvdaemon config: transports), or auto"
    )


def _leads_to(address: str, identity: str) -> bool:
    """Whether this shm address leads from here to the socket of this identity."""
    path = Path(address.partition(":")[2])
    return bool(identity) and socket_identity(path) == identity and os.access(path, os.W_OK)
