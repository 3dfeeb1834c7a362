"""A server on 127.0.0.1: answers by a function, remembers what it was asked, and fails where it is told to."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    method: str
    path: str  # with its query
    headers: Mapping[str, str]
    base: str  # address of the server that was asked

    @property
    def plain(self) -> str:
        return self.path.partition("?")[0]


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = False  # whether a part of the body may be asked for


@dataclass
class Double:
    """``cuts``: of the paths that end so, how many bytes come before the connection breaks, once for each number.
    ``holds``: of the paths that end so, answers stop in the middle until the event is set.
    """

    url: str
    asked: list[Asked] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, threading.Event] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of bodies, by path
    reached: threading.Event = field(default_factory=threading.Event)  # a hold

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def bodies(self, end: str) -> list[Asked]:
        """Requests for the content of what ends so."""
        return [each for each in self.asked if each.method == "GET" and each.plain.endswith(end)]


@contextmanager
def serving_http(answer: Callable[[Asked], Answer]) -> Iterator[Double]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            asked = Asked(self.command, self.path, dict(self.headers.items()), double.url)
            double.asked.append(asked)
            given = answer(asked)
            body, status, headers = given.body, given.status, dict(given.headers)
            wanted = self.headers.get("Range", "")
            if given.ranges and wanted.startswith("bytes=") and status == 200:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self._send(asked.plain, body)

        def _send(self, path: str, body: bytes) -> None:
            cut = next((cuts for end, cuts in double.cuts.items() if path.endswith(end) and cuts), None)
            hold = next((event for end, event in double.holds.items() if path.endswith(end)), None)
            if cut is not None:
                body = body[: cut.pop(0)]
                self.close_connection = True
            try:
                if hold is not None:
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    double.reached.set()
                    hold.wait(30)
                    body = body[len(body) // 2 :]
                self.wfile.write(body)
            except OSError:
                return  # the client is gone
            double.sent[path] = double.sent.get(path, 0) + len(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    double = Double(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        for event in double.holds.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join()
