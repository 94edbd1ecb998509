"""Several streams at once on one event loop, with a deadline for each; one is cancelled in the middle.

python examples/asyncio_streams.py [--address HOST:PORT ...]
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import aclosing

from infinitellm import AsyncClient, Tokens


async def read(client: AsyncClient, name: str, prompt: str, most: int | None) -> None:
    """Reads one stream, to its end or for so many tokens."""
    tokens = 0
    # Leaving the block ends the request in the cluster as well.
    async with aclosing(client.generate(prompt, max_tokens=64, timeout_s=60, ignore_eos=True)) as events:
        async for event in events:
            if isinstance(event, Tokens):
                tokens += len(event.ids)
                if most is not None and tokens >= most:
                    break
    print(f"{name}: {tokens} tokens")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", nargs="+", default=["127.0.0.1:50051"], help="gRPC addresses of gateways")
    arguments = parser.parse_args()
    async with AsyncClient(arguments.address) as client, asyncio.TaskGroup() as group:
        group.create_task(read(client, "whole", "Once upon a time", None))
        group.create_task(read(client, "cancelled", "In a hole in the ground", 8))


if __name__ == "__main__":
    asyncio.run(main())
