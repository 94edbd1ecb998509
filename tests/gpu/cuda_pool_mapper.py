"""An instance's process on a GPU: ``cuda_pool_mapper.py SOCKET_PATH SESSION_ID``.

Maps the pool, adds the session id to block 1, says what block 2 holds, and waits for lines on stdin: after the first it
gives the pool up and says "closed".
"""

import sys
import time
from pathlib import Path

from services.core.blocks import PoolGeometry
from services.dataplane.devices import open_device
from services.dataplane.pool_socket import map_pool

GEOMETRY = PoolGeometry(layers=2, kv_heads=3, block_tokens=16, head_dim=8, dtype="bfloat16")


def main(path, session_id):
    device = open_device("cuda")
    pool = map_pool(Path(path), int(session_id), time.monotonic() + 60, device)
    blocks = pool.as_tensor(GEOMETRY)
    blocks[1] += float(session_id)
    device.settle()
    print(f"mapped {blocks[2].float().mean().item():g}", flush=True)
    sys.stdin.readline()
    del blocks
    pool.close()
    print("closed", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
