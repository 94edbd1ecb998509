"""Resumes a stream of server-sent events at another gateway, with nothing but the standard library.

python examples/resume_sse.py http://127.0.0.1:8000 http://127.0.0.1:8001

It leaves the first gateway in the middle of the answer and reads the rest from the last one.
"""

from __future__ import annotations

import http.client
import json
import sys
from urllib.parse import urlsplit


class Stream:
    """What has come of one answer."""

    def __init__(self) -> None:
        self.request_id = ""
        self.last_event_id = ""
        self.done = False

    def read(self, gateway: str, method: str, path: str, body: bytes | None, most: int | None) -> None:
        """Prints text until the stream ends, or so many events have come."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}  # which brings the events' ids
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        connection = http.client.HTTPConnection(urlsplit(gateway).netloc, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{gateway}: {response.status}: {response.read().decode()}")
            self.request_id = response.headers["X-Request-Id"]
            events = 0
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name == "id":
                    self.last_event_id = value
                elif name == "data" and value == "[DONE]":
                    self.done = True
                elif name == "data":
                    chunk = json.loads(value)
                    if "error" in chunk:
                        raise SystemExit(f"\n{chunk['error']['message']}")
                    print(chunk["choices"][0]["text"], end="", flush=True)
                    events += 1
                    if events == most:
                        return
        finally:
            connection.close()


def main() -> int:
    gateways = sys.argv[1:] or ["http://127.0.0.1:8000"]
    body = {"prompt": "Once upon a time", "max_tokens": 64, "temperature": 0, "ignore_eos": True, "stream": True}
    stream = Stream()
    stream.read(gateways[0], "POST", "/v1/completions", json.dumps(body).encode(), most=10)
    print(" | ", end="")
    stream.read(gateways[-1], "GET", f"/v1/streams/{stream.request_id}", None, most=None)
    print()
    return 0 if stream.done else 1


if __name__ == "__main__":
    sys.exit(main())
