"""Tasks that lose a cancellation end all the same."""

import asyncio

from services.runtime.cancelling import cancel


def test_a_task_that_loses_a_cancellation_to_an_error_is_cancelled_again():
    async def run():
        lost = 0

        async def tries_again():
            nonlocal lost
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if lost == 2:
                        raise
                    lost += 1

        async def ends():
            return 1

        task, ended = asyncio.create_task(tries_again()), asyncio.create_task(ends())
        await ended
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await cancel([task, ended])
        assert task.cancelled()
        assert lost == 2

    asyncio.run(run())
