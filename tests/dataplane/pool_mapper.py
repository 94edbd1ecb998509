"""An instance's process: ``pool_mapper.py SOCKET_PATH SESSION_ID``.

Maps the pool, fills block 1 with the session id, says "mapped", and waits for a line on stdin; then gives the pool up,
says "closed" and waits for the next line.
"""

import sys
import time
from pathlib import Path

from services.core.blocks import PoolGeometry
from services.dataplane.pool_socket import map_pool

GEOMETRY = PoolGeometry(layers=2, kv_heads=3, block_tokens=4, head_dim=8, dtype="bfloat16")


def main(path, session_id):
    pool = map_pool(Path(path), int(session_id), time.monotonic() + 20)
    blocks = pool.as_tensor(GEOMETRY)
    blocks[1] = float(session_id)
    print("mapped", flush=True)
    sys.stdin.readline()
    del blocks
    pool.close()
    print("closed", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
