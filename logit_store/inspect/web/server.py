"""Runs the pages on an address: a socket, a token where one is needed, and the server's loop."""

import secrets
import socket
from collections.abc import Callable, Sequence

import uvicorn

from logit_store.inspect.web.app import make_app
from logit_store.inspect.web.safety import is_loopback
from logit_store.inspect.web.stores import Served
from schemas.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(64)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--host and --port must be an address of this machine that is free, but {host} port "
            f"{port} is not ({error.strerror}); choose another --port, or 0 for any."
        ) from error
    return found


def address(host: str, port: int, token: str | None) -> str:
    """What a person opens."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def needed_token(host: str, given: str | None) -> str | None:
    """The token of an address: the one given, else a new one where others can connect."""
    return given or (None if is_loopback(host) else secrets.token_urlsafe(24))


def serve(
    stores: Sequence[Served],
    host: str,
    port: int,
    token: str | None,
    names: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Serve until interrupted; `say` gets the address once it is open.

    An address that others can reach has a token, `token` or a new one. Raises ConfigError if the
    address cannot be had.
    """
    token = needed_token(host, token)
    with listen(host, port) as open_socket:
        actual = open_socket.getsockname()[1]
        app = make_app(stores, token, [*names, host], actual)
        say(address(host, actual, token))
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off"
        )
        uvicorn.Server(settings).run(sockets=[open_socket])
