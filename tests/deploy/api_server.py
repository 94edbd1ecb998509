"""An HTTP fake of Kubernetes' API server: pods of one namespace, listed, watched and patched. It misbehaves on order.

Every write is checked: the patch as it came, and the pod that results against Kubernetes' own schema, strictly. What is
wrong with a write is kept in ``violations``, and answered 422.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

VERSION = "1.34"
NAMESPACE = "workers"
LABELS = {"app.kubernetes.io/name": "kvdaemon"}

Pod = dict[str, Any]


class ApiServer:
    """``with ApiServer() as server``. All methods may be called from any thread.

    Attributes:
        writes: (pod, annotations) of every patch that was applied.
        faults: by kind of request ("list", "watch", "patch"), what the next ones get instead of an answer: a status,
            "cut" (the connection ends in the middle of a line), "gone" (a watch event that says 410) or "odd" (one that
            no server should send).
    """

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.writes: list[tuple[str, dict[str, str]]] = []
        self.violations: list[str] = []
        self.requests: dict[str, int] = defaultdict(int)
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self._version = 100
        self._uids = 0
        self._forgotten = 0  # versions up to here cannot be watched from
        self._events: list[tuple[int, str, Pod]] = []
        self._changed = threading.Condition()
        self._closing = False
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def add(self, name: str, **labels: str) -> None:
        """A new pod; one of the same name is replaced by another with a uid of its own."""
        with self._changed:
            if name in self.pods:
                self._delete(name)
            self._uids += 1
            spec = {"containers": [{"name": "kvdaemon", "image": "infinite-llm/engine:0.1.0-cpu"}]}
            metadata = {
                "name": name,
                "namespace": NAMESPACE,
                "uid": f"uid-{self._uids}",
                "labels": {**LABELS, **labels},
            }
            self._put("ADDED", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def annotate(self, name: str, annotations: dict[str, str]) -> None:
        with self._changed:
            pod = copy.deepcopy(self.pods[name])
            pod["metadata"].setdefault("annotations", {}).update(annotations)
            self._put("MODIFIED", pod)

    def delete(self, name: str) -> None:
        with self._changed:
            self._delete(name)

    def forget_history(self) -> None:
        """Watches from versions before this moment are answered 410."""
        with self._changed:
            self._version += 1
            self._forgotten = self._version
            self._events.clear()

    def wait_for(self, kind: str, count: int, timeout_s: float = 30.0) -> None:
        """Until so many requests of a kind have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.requests[kind] >= count, timeout_s), dict(self.requests)

    def _delete(self, name: str) -> None:
        self._version += 1
        pod = self.pods.pop(name)
        pod["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, "DELETED", pod))
        self._changed.notify_all()

    def _put(self, event: str, pod: Pod) -> None:
        self._version += 1
        pod["metadata"]["resourceVersion"] = str(self._version)
        self.pods[pod["metadata"]["name"]] = pod
        self._events.append((self._version, event, copy.deepcopy(pod)))
        self._changed.notify_all()

    # ------------------------------------------------------------ requests

    def begin(self, kind: str) -> int | str | None:
        """Counts a request; answers the fault that it is to get."""
        with self._changed:
            self.requests[kind] += 1
            self._changed.notify_all()
            return self.faults[kind].pop(0) if self.faults[kind] else None

    def listing(self, wanted: dict[str, str]) -> dict[str, Any]:
        with self._changed:
            items = [pod for pod in self.pods.values() if pod["metadata"]["labels"].items() >= wanted.items()]
            metadata = {"resourceVersion": str(self._version)}
            return {"apiVersion": "v1", "kind": "PodList", "metadata": metadata, "items": copy.deepcopy(items)}

    def next_event(self, after: int, until: float) -> tuple[int, str, Pod] | None:
        """The first event of a later version; None when the time is over."""
        with self._changed:
            while not self._closing and (remaining := until - time.monotonic()) > 0:
                found = next((event for event in self._events if event[0] > after), None)
                if found is not None:
                    return found
                self._changed.wait(remaining)
            return None

    def is_forgotten(self, version: int) -> bool:
        with self._changed:
            return version < self._forgotten

    def patch(self, name: str, content_type: str, body: bytes) -> tuple[int, dict[str, Any]]:
        with self._changed:
            pod = copy.deepcopy(self.pods.get(name))
            if pod is None:
                return 404, _status(404, f'pods "{name}" not found')
            patch = json.loads(body)
            problem = _problem(patch, content_type)
            if not problem and patch["metadata"].get("uid", pod["metadata"]["uid"]) != pod["metadata"]["uid"]:
                return 422, _status(422, "metadata.uid: Invalid value: field is immutable")
            if not problem:
                pod["metadata"].setdefault("annotations", {}).update(patch["metadata"]["annotations"])
                try:
                    kubernetes_validate.validate(pod, VERSION, strict=True)
                except kubernetes_validate.ValidationError as error:
                    problem = error.message
            if problem:
                self.violations.append(problem)
                return 422, _status(422, problem)
            self.writes.append((name, patch["metadata"]["annotations"]))
            self._put("MODIFIED", pod)
            return 200, pod


def _problem(patch: Any, content_type: str) -> str:
    if content_type not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
        return f"content type {content_type}"
    if not isinstance(patch, dict) or set(patch) != {"metadata"} or not {"annotations"} <= set(patch["metadata"]):
        return f"a patch of more or less than annotations: {patch}"
    try:  # the patch as a pod of its own: what it says must be of the schema's types
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "x"}]}, **patch}
        kubernetes_validate.validate(pod, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def _status(code: int, message: str) -> dict[str, Any]:
    reason = {404: "NotFound", 409: "Conflict", 410: "Expired", 429: "TooManyRequests"}.get(code, "InternalError")
    status = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure"}
    return {**status, "code": code, "reason": reason, "message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ApiServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path != f"/api/v1/namespaces/{NAMESPACE}/pods":
            self._answer(404, _status(404, self.path))
        elif query.get("watch", "").lower() == "true":
            self._watch(query)
        elif not self._misbehaved(self.server_state.begin("list")):
            wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
            self._answer(200, self.server_state.listing(wanted))

    def do_PATCH(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        prefix, _, name = urlsplit(self.path).path.rpartition("/")
        if self._misbehaved(self.server_state.begin("patch")):
            return
        if prefix != f"/api/v1/namespaces/{NAMESPACE}/pods":
            self._answer(404, _status(404, self.path))
            return
        self._answer(*self.server_state.patch(name, self.headers["Content-Type"], body))

    def _watch(self, query: dict[str, str]) -> None:
        state, fault = self.server_state, self.server_state.begin("watch")
        if isinstance(fault, int) and self._misbehaved(fault):
            return
        version = int(query["resourceVersion"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "odd":
            self._event({"type": "ERROR", "object": {"code": 500}})
        elif fault == "gone" or state.is_forgotten(version):
            self._event({"type": "ERROR", "object": _status(410, "too old resource version")})
        else:
            until = time.monotonic() + float(query.get("timeoutSeconds", "60"))
            wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
            while (found := state.next_event(version, until)) is not None:
                version, kind, pod = found
                if pod["metadata"]["labels"].items() < wanted.items():
                    continue
                if fault == "cut":  # in the middle of the line: the event is lost with the connection
                    self._chunk(json.dumps({"type": kind, "object": pod})[:40].encode())
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self._event({"type": kind, "object": pod})
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(json.dumps(event).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        except OSError:
            self.close_connection = True

    def _misbehaved(self, fault: int | str | None) -> bool:
        if fault is None:
            return False
        if isinstance(fault, int):
            self._answer(fault, _status(fault, "as ordered"), retry_after=fault == 429)
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return True

    def _answer(self, code: int, body: dict[str, Any], retry_after: bool = False) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)
