"""Opens the device of a process's configuration."""

from __future__ import annotations

from services.dataplane.device import Device
from services.dataplane.device_name import parse_device
from services.dataplane.host_device import HostDevice
from services.dataplane.interpreted_device import InterpretedDevice


def open_device(name: str) -> Device:
    """
    Args:
        name: as ``parse_device`` takes it.

    Raises:
        ConfigError: there is no such device, or it is too old.
    """
    parsed = parse_device(name)
    match parsed.kind:
        case "cpu":
            return HostDevice()
        case "interpreter":
            return InterpretedDevice()
        case "cuda":
            # Imported here: it opens CUDA's libraries, which the CPU does not need.
            from services.dataplane.cuda_device import CudaDevice

            return CudaDevice(parsed.index)
