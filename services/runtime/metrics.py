"""Every metric of every service: here, and nowhere else, are its name, unit, help and labels.

Names follow Prometheus' conventions: base units, ``_total`` for what only grows, ``_ratio`` for shares of 1. No label
has a request's id or anything else without bounds; series of a peer end with the connection to it.
"""

from __future__ import annotations

from services.runtime.membership import Kind as Service
from services.runtime.metric_spec import MetricSpec

_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_POWERS = tuple(float(1 << power) for power in range(15))


def _counter(name: str, text: str, *services: Service, labels: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name, "counter", text, services, labels)


def _gauge(name: str, text: str, *services: Service, labels: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name, "gauge", text, services, labels)


def _summary(name: str, text: str, *services: Service, labels: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name, "summary", text, services, labels)


def _histogram(
    name: str, text: str, *services: Service, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
) -> MetricSpec:
    return MetricSpec(name, "histogram", text, services, labels, buckets)


# Requests, as their clients see them.
TIME_TO_FIRST_TOKEN = _histogram(
    "infinite_llm_time_to_first_token_seconds",
    "From a request's arrival to its first token, tokenizing and queueing included.",
    "gateway",
    buckets=_LONG_S,
)
INTER_TOKEN_LATENCY = _histogram(
    "infinite_llm_inter_token_latency_seconds", "Between two tokens of a request.", "gateway", buckets=_SHORT_S
)
REQUEST_DURATION = _histogram(
    "infinite_llm_request_duration_seconds",
    "From the arrival of a request that was answered in full to its end.",
    "gateway",
    buckets=_LONG_S,
)
REQUESTS = _counter(
    "infinite_llm_requests_total",
    "Requests that have ended: stop, length, aborted (by the client), refused (at once or later).",
    "gateway",
    labels=("outcome",),
)
REFUSALS = _counter(
    "infinite_llm_refusals_total",
    "Requests that ended with an error, by its reason; a malformed one never becomes a request.",
    "gateway",
    labels=("reason",),
)
REQUESTS_IN_PROGRESS = _gauge("infinite_llm_requests_in_progress", "Requests that have not ended.", "gateway")
PROMPT_TOKENS = _counter("infinite_llm_prompt_tokens_total", "Tokens of admitted prompts.", "gateway")
CACHED_PROMPT_TOKENS = _counter(
    "infinite_llm_cached_prompt_tokens_total",
    "Prompt tokens whose KV was found in the cluster, of requests that were answered in full.",
    "gateway",
)
GENERATION_TOKENS = _counter(
    "infinite_llm_generation_tokens_total", "Tokens generated and passed on to clients.", "gateway"
)
FAILOVERS = _counter(
    "infinite_llm_failovers_total", "Times that a request lost its instance and was to go elsewhere.", "gateway"
)
CONNECTED_INSTANCES = _gauge(
    "infinite_llm_connected_instances", "Instances that this gateway can submit requests to.", "gateway"
)
RESUMED = _counter("infinite_llm_resumed_requests_total", "Streams that a client resumed at this gateway.", "gateway")
JOURNAL_FAILURES = _counter(
    "infinite_llm_journal_failures_total",
    "Writes to Redis that failed and are tried again, and reads that failed.",
    "gateway",
)
JOURNAL_DROPPED = _counter(
    "infinite_llm_journal_dropped_entries_total",
    "Journal entries given up because Redis was away for too long.",
    "gateway",
)
JOURNAL_QUEUED = _gauge("infinite_llm_journal_queued_bytes", "Journal entries that wait to be written.", "gateway")

# The engine of an instance.
REQUESTS_RUNNING = _gauge("infinite_llm_requests_running", "Requests that hold KV memory and are computed.", "instance")
REQUESTS_WAITING = _gauge("infinite_llm_requests_waiting", "Requests that wait for KV memory.", "instance")
STEP_TIME = _histogram(
    "infinite_llm_step_seconds",
    "Time of a step, by whether prompts were computed in it (prefill) or not (decode).",
    "instance",
    labels=("phase",),
    buckets=_SHORT_S,
)
STEP_PARTS = _counter(
    "infinite_llm_step_part_seconds_total",
    "Time of all steps by part: non_attention, send (queries), local_attention, remote_wait, merge.",
    "instance",
    labels=("part",),
)
BATCH_TOKENS = _histogram("infinite_llm_batch_tokens", "Tokens computed in a step.", "instance", buckets=_POWERS)
BATCH_REQUESTS = _histogram(
    "infinite_llm_batch_requests", "Requests that took part in a step.", "instance", buckets=_POWERS
)
COMPUTED_TOKENS = _counter(
    "infinite_llm_computed_tokens_total",
    "Tokens computed, in chunks of prompts (prefill) or one at a time (decode).",
    "instance",
    labels=("phase",),
)
RECOMPUTED_TOKENS = _counter(
    "infinite_llm_recomputed_tokens_total",
    "Of the tokens computed, those whose KV had been computed before and was lost or given up.",
    "instance",
)
PREEMPTIONS = _counter(
    "infinite_llm_preemptions_total",
    "Running requests that gave up their KV, for want of it (memory) or with a daemon that was lost (kvdaemon_lost).",
    "instance",
    labels=("reason",),
)
DISCARDED_STEPS = _counter("infinite_llm_discarded_steps_total", "Steps that a lost daemon made worthless.", "instance")
KV_CACHE_USAGE = _gauge(
    "infinite_llm_kv_cache_usage_ratio",
    "Share of the instance's own pool, its workspace aside, that requests hold.",
    "instance",
)
BORROWED_BLOCKS = _gauge(
    "infinite_llm_borrowed_blocks",
    "Blocks of an instance's running requests on another daemon; shared ones count for each request.",
    "instance",
    labels=("instance_id", "kvdaemon_id"),
)

# The data plane from both of its ends: a peer is a daemon for an instance, and an instance for a daemon.
DATAPLANE_SENT = _counter(
    "infinite_llm_dataplane_sent_bytes_total",
    "Messages sent to a peer: queries, partial states, blocks.",
    "instance",
    "kvdaemon",
    labels=("peer", "transport"),
)
DATAPLANE_RECEIVED = _counter(
    "infinite_llm_dataplane_received_bytes_total",
    "Messages received from a peer, or from a daemon that writes on its behalf.",
    "instance",
    "kvdaemon",
    labels=("peer", "transport"),
)
REMOTE_ANSWER_TIME = _summary(
    "infinite_llm_remote_answer_seconds",
    "From sending a layer's query to a daemon until its answer was taken.",
    "instance",
    labels=("peer", "transport"),
)
HOSTED_ATTENTION_TIME = _summary(
    "infinite_llm_hosted_attention_seconds", "Attention computed here for a layer's query of an instance.", "kvdaemon"
)

# A daemon's pool.
POOL_BLOCKS = _gauge(
    "infinite_llm_pool_blocks",
    "Blocks of the pool by state: free, cached, workspace (of the instance beside it), reserved, in_use.",
    "kvdaemon",
    labels=("state",),
)
POOL_BYTES = _gauge("infinite_llm_pool_bytes", "Size of the pool.", "kvdaemon")
BLOCK_BYTES = _gauge(
    "infinite_llm_block_bytes", "Size of a block; 0 until an instance has formatted the pool.", "kvdaemon"
)
LENT_BLOCKS = _gauge(
    "infinite_llm_lent_blocks",
    "Blocks here that an instance other than the one beside the daemon holds, reserved ones included.",
    "kvdaemon",
    labels=("instance_id", "kvdaemon_id"),
)

# The gManager.
LEADS = _gauge("infinite_llm_gmanager_leads", "1 where this gManager leads and may give orders.", "gmanager")
LEADER_CHANGES = _counter(
    "infinite_llm_leader_changes_total",
    "Times that another leader was seen than before; each gManager counts for itself.",
    "gmanager",
)
MEMBERS = _gauge("infinite_llm_members", "Processes that the gManager knows, by kind.", "gmanager", labels=("kind",))
HEARTBEAT_STREAMS = _gauge(
    "infinite_llm_heartbeat_streams",
    "Processes whose heartbeats come to the gManager itself (direct) or by way of a KV daemon (relayed).",
    "gmanager",
    labels=("way",),
)
PLANNING_TIME = _histogram("infinite_llm_planning_seconds", "Time of making a plan.", "gmanager", buckets=_SHORT_S)
PLANNED_THROUGHPUT = _gauge(
    "infinite_llm_planned_throughput_tokens_per_second",
    "Output of the cluster as modelled for the latest plan, with its moves (with) and as it is (without).",
    "gmanager",
    labels=("moves",),
)
MOVES_IN_PROGRESS = _gauge("infinite_llm_moves_in_progress", "Moves planned and not ended.", "gmanager")
MOVES = _counter(
    "infinite_llm_moves_total",
    "Moves that have ended, by kind (lend, relieve, home, spread) and end (DONE, or why not).",
    "gmanager",
    labels=("kind", "end"),
)
MOVED_BLOCKS = _counter(
    "infinite_llm_moved_blocks_total", "Blocks that these moves have moved.", "gmanager", labels=("kind",)
)
PREDICTED_GAIN = _gauge(
    "infinite_llm_move_predicted_gain_tokens_per_second",
    "Mean gain in output that was predicted for the latest moves whose gain has been measured.",
    "gmanager",
    labels=("kind",),
)
MEASURED_GAIN = _gauge(
    "infinite_llm_move_measured_gain_tokens_per_second",
    "Mean gain in output that was measured for the same moves.",
    "gmanager",
    labels=("kind",),
)
STEP_PREDICTION_ERROR = _gauge(
    "infinite_llm_step_prediction_error_ratio",
    "Median relative error of the predicted time of an instance's decode steps.",
    "gmanager",
    labels=("instance_id",),
)

# Every process.
BUILD_INFO = _gauge(
    "infinite_llm_build_info",
    "Always 1; the label says which version runs.",
    "gateway",
    "gmanager",
    "instance",
    "kvdaemon",
    labels=("version",),
)

ALL = tuple(value for value in tuple(globals().values()) if isinstance(value, MetricSpec))
