"""What services ask of Kubernetes' API server: which pods there are, and an annotation on them.

Only what must be asked for is asked for; who a process is itself, its manifest tells it (``config.py``). The API server
may be away, slow or busy at any time, and nothing here is needed to serve a request: readers go on with the pods they
saw last, a write that failed is made again later.

The official client is synchronous. So a thread follows the pods, and a write is a call for ``asyncio.to_thread``.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import kubernetes.client
import kubernetes.config
import kubernetes.watch
import urllib3.exceptions

from services.core.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"

_CALL_TIMEOUT_S = (3.0, 5.0)  # connecting, reading
_WATCH_S = 240  # then the server ends a watch; silence beyond it is a connection that died unnoticed
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.2, 30.0
_THE_PODS_OWN = (404, 409, 422)  # not found; a conflict; the uid is another one's
# Everything that can go wrong on the way, a line cut in the middle included.
_FAILURES = (kubernetes.client.ApiException, urllib3.exceptions.HTTPError, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod as the API server showed it last.

    Attributes:
        uid: a pod of the same name that replaces it has another.
        deletion_cost: of its annotation; None where it has none that is a number.
        ending: it is being deleted.
    """

    name: str
    uid: str
    deletion_cost: int | None
    ending: bool


def connect_in_cluster() -> kubernetes.client.ApiClient:
    """A client with the pod's own service account; its token is read anew when kubelet has replaced it.

    Raises:
        ConfigError: this process runs in no pod, or its pod mounts no token.
    """
    configuration = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    except kubernetes.config.ConfigException as exc:
        raise ConfigError(f"kubernetes: {exc}; does the pod mount its service account's token?") from exc
    return make_client(configuration)


def make_client(configuration: kubernetes.client.Configuration) -> kubernetes.client.ApiClient:
    """A client that leaves all retries to its callers."""
    configuration.retries = False
    return kubernetes.client.ApiClient(configuration)


class Pods:
    """The pods of one namespace that a label selector chooses. ``latest`` may be read by any thread.

    A list, then a watch from its version on; a watch that breaks is resumed where it broke, and only if the server has
    forgotten that version (410), or says what is not understood, everything is listed again.
    """

    def __init__(self, client: kubernetes.client.ApiClient, namespace: str, selector: str) -> None:
        self.latest: Mapping[str, PodState] = {}
        self._api = kubernetes.client.CoreV1Api(client)
        self._namespace = namespace
        self._selector = selector
        self._closed = threading.Event()
        self._watch = kubernetes.watch.Watch()
        self._pause_s = _MIN_PAUSE_S
        self._thread = threading.Thread(target=self._follow, name="kubernetes pods", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread soon; it holds up nobody who does not wait for it."""
        self._closed.set()
        self._watch.stop()

    def set_deletion_cost(self, pod: PodState, cost: int) -> bool:
        """Annotates the pod. Blocks for some seconds at most.

        Answers False if just this pod refuses it: it is gone or replaced, or somebody else writes to it now.

        Raises:
            UnavailableError: the server does not answer or will not; the annotation may have been written.
        """
        # With the uid, a pod of the same name that has replaced this one is left alone.
        body = {"metadata": {"uid": pod.uid, "annotations": {DELETION_COST: str(cost)}}}
        try:
            self._api.patch_namespaced_pod(pod.name, self._namespace, body, _request_timeout=_CALL_TIMEOUT_S)
        except _FAILURES as exc:
            message = f"pod {pod.name}: deletion cost not written: {_reason(exc)}"
            if isinstance(exc, kubernetes.client.ApiException) and exc.status in _THE_PODS_OWN:
                log.info(message)
                return False
            raise UnavailableError(message) from exc
        return True

    def _follow(self) -> None:
        version = ""  # nothing has been listed
        while not self._closed.is_set():
            try:
                if not version:
                    version = self._list()
                version = self._stream(version)
            except Exception as exc:  # whatever it is, it must not end this thread
                refused = isinstance(exc, kubernetes.client.ApiException) and exc.status != 410
                version = version if refused else ""
                self._rest(exc)

    def _list(self) -> str:
        """Answers the version from which on to watch."""
        listed = self._api.list_namespaced_pod(
            self._namespace, label_selector=self._selector, _request_timeout=_CALL_TIMEOUT_S
        )
        self.latest = {pod.metadata.name: _pod_state(pod) for pod in listed.items}
        return str(listed.metadata.resource_version)

    def _stream(self, version: str) -> str:
        """One watch, until it ends; answers the version from which on to go on. Failures lose nothing seen before."""
        self._watch.resource_version = version
        try:
            for event in self._watch.stream(
                self._api.list_namespaced_pod,
                self._namespace,
                label_selector=self._selector,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=_WATCH_S,
                _request_timeout=(_CALL_TIMEOUT_S[0], _WATCH_S + _CALL_TIMEOUT_S[1]),
            ):
                if self._closed.is_set():
                    break
                self._apply(event)
                self._pause_s = _MIN_PAUSE_S
        except _FAILURES as exc:
            if isinstance(exc, kubernetes.client.ApiException):
                raise
            self._rest(exc)
        return str(self._watch.resource_version)

    def _apply(self, event: dict[str, Any]) -> None:
        if event["type"] in ("ADDED", "MODIFIED"):
            pod = _pod_state(event["object"])
            self.latest = {**self.latest, pod.name: pod}
        elif event["type"] == "DELETED":
            gone = event["object"].metadata.name
            self.latest = {name: pod for name, pod in self.latest.items() if name != gone}

    def _rest(self, exc: Exception) -> None:
        """Waits longer after each failure in a row, and at least as long as the server asks for."""
        if self._closed.is_set():
            return
        headers = getattr(exc, "headers", None) or {}
        asked = headers.get("Retry-After", "")
        pause_s = max(self._pause_s * random.uniform(0.5, 1.0), float(asked) if asked.isdecimal() else 0.0)
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        log.info("pods not followed, trying again: %s", _reason(exc), extra={"pause_s": round(pause_s, 1)})
        self._closed.wait(pause_s)


def _pod_state(pod: Any) -> PodState:
    cost = (pod.metadata.annotations or {}).get(DELETION_COST, "")
    number = int(cost) if cost.removeprefix("-").isdecimal() else None
    return PodState(pod.metadata.name, pod.metadata.uid, number, pod.metadata.deletion_timestamp is not None)


def _reason(exc: Exception) -> str:
    return f"{exc.status} {exc.reason}" if isinstance(exc, kubernetes.client.ApiException) else str(exc)
