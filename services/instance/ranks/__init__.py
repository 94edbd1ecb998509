"""Tensor parallelism: one instance as several processes, its ranks, each with a part of all heads and weights.

    leader (rank 0)                                         rank 1 ..
    engine, scheduler, BlockMemory, rManager, sessions
      a step's batch and plans ──── order, over a pipe ───> the same forward, on its own heads,
      forward on its own heads <─── all-reduces (gloo) ───> with data connections of its own
      all ends in, or the step is void <── end ──────────── what it lost

Blocks stay whole: all ranks map the pool of the daemon beside them, and each reads and writes its own heads of every
block. So nobody but the ranks themselves knows of them, and instances of any degree share blocks.
"""
