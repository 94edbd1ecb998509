"""What ``--link 25gbit,50us`` means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.core.errors import ConfigError

_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One direction of a link between two peers.

    Attributes:
        bytes_per_s: bandwidth; infinite where it costs no time.
        latency_s: from the last byte sent to the last byte received.
    """

    bytes_per_s: float
    latency_s: float


def parse_link(text: str) -> LinkSpec:
    """``"25gbit,50us"``: bandwidth in kbit, mbit or gbit per second, then latency in us, ms or s, one way.

    Raises:
        ConfigError: it is something else.
    """
    bandwidth, comma, latency = text.strip().lower().partition(",")
    if not comma:
        raise ConfigError(f"link {text!r}: wanted are a bandwidth and a latency, as in 25gbit,50us")
    bits = _quantity(text, "bandwidth", bandwidth, _BITS)
    if bits == 0:
        raise ConfigError(f"link {text!r}: the bandwidth must be positive")
    return LinkSpec(bits / 8, _quantity(text, "latency", latency, _SECONDS))


def _quantity(text: str, what: str, value: str, units: dict[str, float]) -> float:
    match = _NUMBER.fullmatch(value.strip())
    if match is None or match[2] not in units:
        raise ConfigError(
            f"link {text!r}: {value.strip()!r} is no {what}; a number and one of {', '.join(units)} is wanted"
        )
    return float(match[1]) * units[match[2]]
