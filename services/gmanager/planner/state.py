"""The planner's own copy of the cluster: sums that follow every move, and the model of ``cost_model`` on top of them.

An instance's batch is what memory allows. From its free blocks, growth comes first: every running request's next
``horizon_tokens`` of output, as far as it is expected to write them. If that does not fit, the youngest requests give
way; if there is more, waiting ones are admitted, in order. Throughput is batch / step time. A move changes who is
admitted, how long attention takes where, and what hosting costs the creditor's own instance.

Blocks and tokens are integers and their sums therefore exact. What is derived from them is measured anew, by one
function, for whoever a move touches: so a load that a plan leads to is measured as it was while planning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from services.core.blocks import PoolGeometry
from services.gmanager.planner.load import ClusterLoad, DaemonLoad, InstanceLoad, RequestLoad
from services.gmanager.planner.policy import PlannerPolicy

_LEAST_S = 1e-9  # a step takes longer, whatever the coefficients say
_MOST_HOSTING = 0.95  # of a device's time: what the model can make sense of


class Daemon:
    """One pool.

    Attributes:
        debtors: instance -> blocks > 0.
        hosting: share of its time that they take.
        releasing: blocks that it hosted are still leaving.
    """

    __slots__ = ("coming", "debtors", "free", "fresh", "hosted", "hosting", "leaving", "load", "owner", "releasing")

    def __init__(self, load: DaemonLoad, fresh: bool) -> None:
        self.load = load
        self.fresh = fresh
        self.free = load.free_blocks
        self.leaving = load.leaving_blocks
        self.coming = load.coming_blocks
        self.owner: Instance | None = None
        self.debtors: dict[Instance, int] = {}
        self.releasing = bool(load.releasing)
        self.hosted = 0  # blocks
        self.hosting = 0.0

    @property
    def id(self) -> str:
        return self.load.kvdaemon_id

    @property
    def geometry(self) -> PoolGeometry:
        return self.load.geometry

    @property
    def vacant(self) -> int:
        """Blocks that can be written to before any move has ended."""
        return self.free - self.leaving

    @property
    def lends(self) -> bool:
        return self.releasing or bool(self.debtors)

    @property
    def hosted_tokens(self) -> int:
        return self.hosted * self.load.geometry.block_tokens


class Loan:
    """What one instance has on one daemon: blocks, and the number of requests that they belong to."""

    __slots__ = ("blocks", "rows")

    def __init__(self) -> None:
        self.blocks = 0
        self.rows = 0


class Running:
    """One request, as far as its blocks matter."""

    __slots__ = ("instance", "load", "local", "movable", "remote")

    def __init__(self, load: RequestLoad, instance: Instance) -> None:
        self.load = load
        self.instance = instance
        self.local = load.local_blocks
        self.movable = load.movable_blocks
        self.remote: dict[Daemon, int] = {}  # blocks > 0


class Instance:
    """One instance.

    Attributes:
        tokens: context in the own pool.
        growth: blocks that its running requests are going to need.
        needs, need_tokens: running sums over the waiting requests that have a place in the batch: blocks, context.
        returning: blocks that it borrowed are still leaving their creditor.
        batch: requests that memory allows.
        step_s: time of a step without what it hosts.
        slack_s: by how much its longest answer stays below ``still_hide`` of its local attention.
        throughput: output tokens per second.
    """

    __slots__ = (
        "batch",
        "borrowed",
        "fresh",
        "growth",
        "home",
        "load",
        "need_tokens",
        "needs",
        "returning",
        "running",
        "slack_s",
        "step_s",
        "throughput",
        "tokens",
    )

    def __init__(self, load: InstanceLoad, home: Daemon, fresh: bool, horizon_tokens: int) -> None:
        self.load = load
        self.home = home
        self.fresh = fresh
        self.borrowed: dict[Daemon, Loan] = {}
        self.returning = False
        self.running: dict[str, Running] = {}  # those whose blocks lie elsewhere or were looked at
        size = home.geometry.block_tokens
        tokens = growth = 0
        for request in load.requests:
            context = request.context_tokens
            tokens += context
            ahead = request.remaining_tokens
            if ahead > horizon_tokens:
                ahead = horizon_tokens
            growth += (context + ahead + size - 1) // size - (context + size - 1) // size
        self.tokens = tokens
        self.growth = growth
        self.needs: list[int] = []
        self.need_tokens: list[int] = []
        blocks = context = 0
        for waiting in load.waiting[: max(0, load.max_batch - len(load.requests))]:
            ahead = min(waiting.remaining_tokens, horizon_tokens)
            blocks += home.geometry.blocks_for(waiting.context_tokens + ahead)
            context += waiting.context_tokens
            self.needs.append(blocks)
            self.need_tokens.append(context)
        self.batch = 0
        self.step_s = self.slack_s = self.throughput = 0.0

    @property
    def id(self) -> str:
        return self.load.instance_id

    @property
    def borrows(self) -> bool:
        return self.returning or bool(self.borrowed)

    @property
    def spare(self) -> int:
        """Free blocks beyond growth; negative if growth does not fit."""
        return self.home.free - self.growth

    @property
    def pressed(self) -> bool:
        """Whether requests wait for memory, or will have to give way for want of it."""
        spare = self.spare
        return spare < 0 or (bool(self.needs) and self.needs[-1] > spare)

    @property
    def unclaimed(self) -> int:
        """Blocks that neither growth nor waiting requests that fit are going to need; negative if growth does not."""
        spare = self.spare
        admitted = bisect_right(self.needs, spare)
        return spare - (self.needs[admitted - 1] if admitted else 0)

    def request(self, load: RequestLoad) -> Running:
        running = self.running.get(load.request_id)
        if running is None:
            running = self.running[load.request_id] = Running(load, self)
        return running

    def giving_way(self) -> tuple[int, int, list[int]]:
        """Who gives way if growth does not fit, youngest first; the oldest never does.

        Returns: their number, their context in the own pool, and the numbers of further free blocks with which one
        request fewer would have to, ascending.
        """
        missing = -self.spare
        if missing <= 0:
            return 0, 0, []
        size = self.home.geometry.block_tokens
        number = tokens = 0
        steps: list[int] = []
        requests = self.load.requests
        for index in range(len(requests) - 1, 0, -1):
            load = requests[index]
            steps.append(missing)
            running = self.running.get(load.request_id)
            remote = sum(running.remote.values()) if running else 0
            missing -= running.local if running else load.local_blocks
            number += 1
            tokens += load.context_tokens - remote * size
            if missing <= 0:
                break
        return number, tokens, steps[::-1]


class State:
    """The whole cluster. Instances whose own daemon is not there are left out: they are about to go as well."""

    def __init__(self, load: ClusterLoad, now: float, policy: PlannerPolicy) -> None:
        self.policy = policy
        oldest = now - policy.stale_s
        # By id: in another order the last digits of sums would differ, and with them the plan now and then.
        daemons = sorted(load.kvdaemons, key=lambda daemon: daemon.kvdaemon_id)
        self.daemons = {daemon.kvdaemon_id: Daemon(daemon, daemon.heard_at >= oldest) for daemon in daemons}
        self.instances: list[Instance] = []
        for instance_load in sorted(load.instances, key=lambda instance: instance.instance_id):
            home = self.daemons.get(instance_load.kvdaemon_id)
            if home is not None:
                fresh = instance_load.heard_at >= oldest
                home.owner = Instance(instance_load, home, fresh, policy.horizon_tokens)
                self.instances.append(home.owner)
        returning = {instance_id for daemon in daemons for instance_id in daemon.releasing}
        for instance in self.instances:
            instance.returning = instance.id in returning
            self._place_remote(instance)
        for instance in self.instances:
            self.measure_step(instance)
        for daemon in self.daemons.values():
            self.measure_hosting(daemon)
        for instance in self.instances:
            self.measure_throughput(instance)

    def _place_remote(self, instance: Instance) -> None:
        size = instance.home.geometry.block_tokens
        for load in instance.load.requests:
            for kvdaemon_id, blocks in load.remote:
                instance.tokens -= blocks * size  # also if that daemon is lost
                daemon = self.daemons.get(kvdaemon_id)
                if daemon is not None:
                    self._host(instance.request(load), daemon, blocks)

    def _host(self, request: Running, daemon: Daemon, blocks: int) -> None:
        """Blocks (negative: fewer) of a request on a daemon that is not its instance's own."""
        instance = request.instance
        before = request.remote.get(daemon, 0)
        loan = instance.borrowed.get(daemon)
        if loan is None:
            loan = instance.borrowed[daemon] = Loan()
        loan.blocks += blocks
        daemon.hosted += blocks
        if before + blocks:
            request.remote[daemon] = before + blocks
            loan.rows += not before
        else:
            del request.remote[daemon]
            loan.rows -= 1
        if loan.blocks:
            daemon.debtors[instance] = loan.blocks
        else:
            del instance.borrowed[daemon], daemon.debtors[instance]

    def shift(self, request: Running, source: Daemon, target: Daemon, blocks: int) -> None:
        """Moves blocks in the books; nothing is measured."""
        instance = request.instance
        for daemon, change in ((source, -blocks), (target, blocks)):
            daemon.free -= change
            if daemon is instance.home:
                request.local += change
                request.movable += change
                instance.tokens += change * daemon.geometry.block_tokens
            else:
                self._host(request, daemon, change)

    def touched(self, request: Running, source: Daemon, target: Daemon) -> tuple[list[Instance], list[Daemon]]:
        """Whose steps, and which daemons' hosting, a move between these daemons can change."""
        instances: dict[Instance, None] = {request.instance: None}
        instances.update(dict.fromkeys(source.debtors))
        instances.update(dict.fromkeys(target.debtors))
        for daemon in (source, target):
            if daemon.owner is not None:
                instances[daemon.owner] = None
        daemons: dict[Daemon, None] = {source: None, target: None}
        for instance in instances:
            daemons[instance.home] = None
            daemons.update(dict.fromkeys(instance.borrowed))
        return list(instances), list(daemons)

    def measure(self, instances: Iterable[Instance], daemons: Iterable[Daemon]) -> None:
        """After a shift: everything that follows from it for what it touched."""
        for instance in instances:
            self.measure_step(instance)
        for daemon in daemons:
            self.measure_hosting(daemon)
            if daemon.owner is not None:
                self.measure_throughput(daemon.owner)

    def measure_step(self, instance: Instance) -> None:
        costs, spare = instance.load.costs, instance.spare
        batch, tokens = len(instance.load.requests), instance.tokens
        if spare < 0:
            number, gone, _ = instance.giving_way()
            batch, tokens = batch - number, tokens - gone
        elif instance.needs:
            admitted = bisect_right(instance.needs, spare)
            if admitted:
                batch, tokens = batch + admitted, tokens + instance.need_tokens[admitted - 1]
        answer_s = self.answer_s(instance)
        local_s = costs.local_s(tokens)
        instance.batch = batch
        instance.step_s = max(costs.other_s(batch) + max(local_s, answer_s), _LEAST_S)
        instance.slack_s = self.policy.still_hide * costs.local_s(instance.tokens) - answer_s

    def answer_s(self, instance: Instance) -> float:
        """The longest answer of a step."""
        layers = instance.home.geometry.layers
        longest = 0.0
        for daemon, loan in instance.borrowed.items():
            answer_s = daemon.load.costs.answer_s(layers, loan.rows, daemon.hosted_tokens)
            if answer_s > longest:
                longest = answer_s
        return longest

    def measure_hosting(self, daemon: Daemon) -> None:
        geometry, costs = daemon.geometry, daemon.load.costs
        daemon.hosting = sum(
            costs.compute_s(geometry.layers, blocks * geometry.block_tokens) / debtor.step_s
            for debtor, blocks in daemon.debtors.items()
        )

    def measure_throughput(self, instance: Instance) -> None:
        own = 1.0 - min(instance.home.hosting, _MOST_HOSTING)
        instance.throughput = instance.batch / instance.step_s * own

    def throughput(self) -> float:
        """Output tokens per second of all instances."""
        return sum(instance.throughput for instance in self.instances)
