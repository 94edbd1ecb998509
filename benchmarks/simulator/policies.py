"""The policies that are compared: how devices are divided into instances, and what these share."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulator.hardware import Hardware
from benchmarks.simulator.instance import Serving
from benchmarks.simulator.models import ModelShape

MAX_NUM_SEQS = 256
MAX_BATCH_TOKENS = 2048
_OUR_BLOCK, _VLLM_BLOCK = 64, 16
SINGLE_DEVICES = 32  # what one instance of vLLM-single is split over at most


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to serve.

    Attributes:
        pooled: instances borrow memory from each other.
        planned: the planner moves blocks before memory runs out.
        single: as few, wide instances as there can be.
    """

    name: str
    pooled: bool
    planned: bool
    single: bool

    @property
    def block_tokens(self) -> int:
        return _OUR_BLOCK if self.pooled else _VLLM_BLOCK

    def devices(self, model: ModelShape, total: int) -> int:
        """Of one instance."""
        return min(total, SINGLE_DEVICES) if self.single else model.devices


VLLM_MULTI = Policy("vllm-multi", pooled=False, planned=False, single=False)
VLLM_SINGLE = Policy("vllm-single", pooled=False, planned=False, single=True)
OURS = Policy("ours", pooled=True, planned=True, single=False)
REACTIVE = Policy("ours-reactive", pooled=True, planned=False, single=False)
POLICIES = (OURS, VLLM_MULTI, VLLM_SINGLE)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What is simulated.

    Attributes:
        devices: of all instances together; what does not make a whole instance stays idle.
        computed_prompts: prompts come with their KV cache.
        moves: share of an instance's network that planned moves may take.
    """

    policy: Policy
    model: ModelShape
    hardware: Hardware
    devices: int
    computed_prompts: bool
    seed: int = 1
    max_num_seqs: int = MAX_NUM_SEQS
    max_batch_tokens: int = MAX_BATCH_TOKENS
    moves: float = 0.25

    @property
    def instance_devices(self) -> int:
        return self.policy.devices(self.model, self.devices)

    @property
    def instances(self) -> int:
        return self.devices // self.instance_devices

    @property
    def network_bytes_per_s(self) -> float:
        """Of one instance, one direction."""
        share = min(self.instance_devices, self.hardware.devices_per_node) / self.hardware.devices_per_node
        return share * self.hardware.network_bytes_per_s

    def size(self, kv_tokens: int) -> tuple[int, int, Serving]:
        """Blocks that requests can have in a pool of so many tokens, blocks of its workspace, and the settings.

        The workspace is sized as ``services.instance.assembly.size_workspace`` does it.
        """
        block = self.policy.block_tokens
        # A wide instance may run as many sequences as the instances that its devices would otherwise be.
        max_num_seqs = self.max_num_seqs * max(1, self.instance_devices // self.model.devices)
        total, workspace = kv_tokens // block, 0
        if self.policy.pooled:
            workspace = 2 * (-(-self.max_batch_tokens // block) + 1)
            max_num_seqs = min(max_num_seqs, total - workspace)
        serving = Serving(block, max_num_seqs, self.max_batch_tokens, self.computed_prompts)
        return total - workspace, workspace, serving
