"""What etcd's client and its watch share."""

from __future__ import annotations

from dataclasses import dataclass

from infinitellm.internal.etcd.v1 import etcd_pb2 as pb


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One entry of the store.

    Attributes:
        create_revision: store revision at which the key came into being; a fencing token, for it never repeats.
        mod_revision: store revision of its last change; what a compare-and-swap compares.
        lease_id: the lease it dies with, 0 for none.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class RangeResult:
    """Keys in ascending order, as they were at ``revision`` of the store."""

    entries: tuple[KeyValue, ...]
    revision: int


def key_value(kv: pb.KeyValue) -> KeyValue:
    """From the wire."""
    return KeyValue(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def prefix_end(prefix: str) -> bytes:
    """The first key after all that start with ``prefix``. UTF-8 has no byte 0xff, so the last byte can grow."""
    if not prefix:
        raise ValueError("an empty prefix would mean the whole store")
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
