"""Serves stores to a test: the real application on a free port of loopback, and plain requests."""

import http.client
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import small_store
import uvicorn

from logit_store.inspect.text import Pieces
from logit_store.inspect.web.app import make_app
from logit_store.inspect.web.server import listen
from logit_store.inspect.web.stores import Served

SCRIPT = "<script>alert('script')</script>"
IMAGE = "<img src=x onerror=alert('image')>"
ESCAPES = "\x1b[31m\u202e\x07"
HOSTILE = {0: SCRIPT, 1: IMAGE, 2: ESCAPES, 3: '"><svg/onload=alert(1)>', 4: "\n", 5: "{{ 7*7 }}"}
"""Pieces of the made-up tokenizer, by id modulo 9; the others are words."""


def pieces() -> Pieces:
    names = [HOSTILE.get(index % 9, f" word{index}") for index in range(small_store.VOCAB)]
    return Pieces([name.encode() for name in names], names)


def opened(*urls: str) -> list[Served]:
    return [Served(url, f"store {index}", pieces()) for index, url in enumerate(urls)]


@contextmanager
def serving(stores: Sequence[Served], token: str | None = None) -> Iterator[str]:
    """Yields the address, without a slash at its end."""
    with listen("127.0.0.1", 0) as open_socket:
        port = open_socket.getsockname()[1]
        app = make_app(stores, token, ["retort.example"], port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [open_socket]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def ask(
    address: str, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of one request; the path is sent as it is."""
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text
