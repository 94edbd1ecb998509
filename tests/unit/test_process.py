"""How a service's process begins and ends."""

import os
import signal
import subprocess
import sys

import pytest

SERVICE = """
import asyncio
from services.runtime.logs import setup_logging
from services.runtime.process import leave, stop_event

async def close():
    {close}

async def serve():
    stop = stop_event(within_s=0.3)
    print("serving", flush=True)
    await stop.wait()
    await close()

setup_logging("test", "test-0")
asyncio.run(serve())
leave(0)
"""


@pytest.mark.parametrize(("set_by_user", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_torchs_threads_sleep_while_they_wait(set_by_user, policy):
    code = "from services.runtime.process import loading\nwith loading(): import torch"
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = {**kept, **set_by_user, "OMP_DISPLAY_ENV": "true"}  # libgomp says what it has read
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_closes_leaves_well(number):
    assert _end("await asyncio.sleep(0.1)", number) == (0, "")


def test_a_service_that_does_not_close_in_time_leaves_and_says_what_it_waits_for():
    code, log = _end("await asyncio.Event().wait()", signal.SIGTERM)
    assert code == 1
    assert "not closed in time" in log
    assert "serve:13 > close:7 > Event.wait" in log


def test_so_does_one_whose_event_loop_stands_still():
    code, log = _end("__import__('time').sleep(60)", signal.SIGTERM)
    assert code == 1
    assert "not closed in time" in log


def _end(close: str, number: signal.Signals) -> tuple[int, str]:
    """Status and log of a service that is asked to end."""
    command = [sys.executable, "-c", SERVICE.format(close=close)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "serving\n"
            process.send_signal(number)
            _, log = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, log
