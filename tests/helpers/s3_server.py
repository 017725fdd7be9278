"""A real S3 server on loopback (moto's), and before it a proxy that counts and spoils answers."""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

BUCKET = "bucket"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


_INTERNAL = b"<Error><Code>InternalError</Code><Message>We failed.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """key: below the bucket. query: as it came. sent: bytes of the body that the client got."""

    method: str
    key: str
    query: str
    range: str
    sent: int
    received: int
    spoiled: str


Spoil = Callable[[str, str, str], str]


@dataclass
class Store:
    """The server as a client sees it.

    spoil: says what to do to a request, from its method, key and query: "drop" the connection in
    the middle of the answer's body, "refuse" before anything is answered, "slow down" (503),
    "short" (fewer bytes than were asked for, and none too few for the header), "trickle" (in small
    pieces with pauses), "error" (500), "empty" (200 and nothing else), "lost" (done, but the
    answer never arrives), "change" (the object gets another last byte before it is answered),
    "stale" (the first answer to the same listing), "forget" (a PUT is answered as if
    it had been done), "deny" (403), "unknown" (501), or "" to leave it alone.
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    spoil: Spoil = lambda method, key, query: ""
    listings: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, method: str, inside: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and inside in r.key]

    @property
    def uploads(self) -> list[str]:
        """The keys that were written, a key a request that wrote bytes of it."""
        return [r.key for r in self.requests if r.method == "PUT" and not r.spoiled]


def one_in_four(how: str, fits: Callable[[str, str], bool] = lambda method, key: True) -> Spoil:
    """Spoil one request of four that fit, from their method and key.

    No request is spoiled more than three times, or chance alone would use up every try of one
    request in some thousands.
    """
    dice = random.Random(how)
    times: Counter[tuple[str, str, str]] = Counter()

    def spoil(method: str, key: str, query: str) -> str:
        request = (method, key, query)
        if not fits(method, key) or times[request] == 3 or dice.random() >= 0.25:
            return ""
        times[request] += 1
        return how

    return spoil


@contextmanager
def server(address: str = "127.0.0.1") -> Iterator[Store]:
    """Both, with the environment that leads clients to them and one bucket made."""
    port = _free()
    moto = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = Store("")
    proxy = ThreadingHTTPServer((address, 0), _handler(store, port))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    store.url = f"http://{address}:{proxy.server_address[1]}"
    told = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {key: os.environ.get(key) for key in told}
    os.environ.update(told)
    try:
        _wait(port)
        _ask(port, "PUT", f"/{BUCKET}")
        yield store
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        from s3fs import S3FileSystem  # takes a second: not for every test

        # fsspec keeps clients, and this one's endpoint is of a server that is gone
        S3FileSystem.clear_instance_cache()
        proxy.shutdown()
        moto.terminate()
        moto.wait()


def _free() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Host": "127.0.0.1", "Authorization": "AWS a:b"}
    connection.request(method, path, body, headers)
    data = connection.getresponse().read()
    connection.close()
    return data


def _wait(port: int) -> None:
    for _ in range(300):
        with suppress(OSError):
            _ask(port, "GET", "/")
            return
        time.sleep(0.1)
    raise TimeoutError("moto doesn't start")


def _handler(store: Store, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            parts = urlsplit(self.path)
            key, query = unquote(parts.path).partition(f"/{BUCKET}/")[2], parts.query
            with store.lock:
                how = store.spoil(self.command, key, query)
            body = self._body()
            sent = 0
            try:
                sent = self._answer(how, body)
            finally:
                told = self.headers.get("Range", "")
                with store.lock:
                    store.requests.append(
                        Request(self.command, key, query, told, sent, len(body), how)
                    )

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _answer(self, how: str, body: bytes) -> int:
            if how == "empty":
                self._head(200, [], 0)
                return 0
            if how == "refuse":
                self._drop()
                return 0
            if how == "error":
                self._head(500, [("Content-Type", "application/xml")], len(_INTERNAL))
                self.wfile.write(_INTERNAL)
                return 0
            if how == "change":
                path = urlsplit(self.path).path
                old = _ask(port, "GET", path)
                _ask(port, "PUT", path, old[:-1] + bytes([old[-1] ^ 1]))
            if how == "slow down":
                self._head(503, [("Content-Type", "application/xml")], len(_SLOW_DOWN))
                self.wfile.write(_SLOW_DOWN)
                return 0
            if how == "unknown":
                self._head(501, [], 0)
                return 0
            if how == "deny":
                self._head(403, [("Content-Type", "application/xml")], len(_DENIED))
                self.wfile.write(b"" if self.command == "HEAD" else _DENIED)
                return 0
            if how == "forget":
                self._head(200, [("ETag", f'"{md5(body).hexdigest()}"')], 0)
                return 0
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            connection.request(
                self.command,
                self.path,
                body=body,
                headers={**headers, "Content-Length": str(len(body))},
            )
            answer = connection.getresponse()
            data = answer.read()
            length = int(answer.headers.get("Content-Length") or 0)
            kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in _OWN]
            connection.close()
            if how == "lost":
                self._drop()
                return 0
            if "list-type" in self.path or "prefix=" in self.path:
                first = store.listings.setdefault(self.path, data)
                if how == "stale":
                    data, length = first, len(first)
            if how == "short" and len(data) > 1:
                data = data[: len(data) // 2]
                length = len(data)
            self._head(
                answer.status, kept, length if self.command == "HEAD" else max(length, len(data))
            )
            if how == "drop":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self._drop()
                return len(data) // 2
            if how == "trickle":
                for at in range(0, len(data), max(1, len(data) // 4)):
                    self.wfile.write(data[at : at + max(1, len(data) // 4)])
                    self.wfile.flush()
                    time.sleep(0.02)
            elif self.command != "HEAD":
                self.wfile.write(data)
            return len(data)

        def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def _drop(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


_OWN = {"content-length", "transfer-encoding", "connection"}
