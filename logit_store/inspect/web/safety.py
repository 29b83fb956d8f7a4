"""What keeps a served store to those it is meant for: hosts, token, headers.

A page of corpus text is hostile input shown in a browser, on a port that every page in that browser
can send requests to. So: a `Host` that a foreign name cannot have (against DNS rebinding), a token
unless only this machine can connect, reading requests alone, and a content security policy under
which nothing runs or loads but the package's own files.
"""

import hmac
import ipaddress
from collections.abc import Iterable
from http.cookies import SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_TOKEN = "token"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Refuses what is not to be served, and puts the headers on what is.

    Without a token the `Host` must be of loopback. With one it may also be an IP address or one of
    `names`: another site's name that is made to lead here is neither, and has no cookie.
    """

    def __init__(self, app: ASGIApp, token: str | None, names: Iterable[str] = (), port: int = 0):
        self._app, self._token = app, token
        self._names = {name.lower() for name in names}
        # Cookies are not kept apart by port.
        self._cookie = f"retort_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                # Text of a corpus stays out of caches; the package's own files name their version.
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of a page, or None."""
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD"):
            return _plain("Only GET is served.", 405)
        if not self._is_host(headers.get("host", "")):
            return _plain("This host name is not served; use the address that was printed.", 421)
        if self._token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == _TOKEN]
        if given:
            if not self._is_token(given[-1]):
                return _plain("The token is wrong; use the address that was printed.", 403)
            # Out of the address bar, the history and whatever a page links to.
            rest = urlencode([(name, value) for name, value in query if name != _TOKEN])
            path = "/" + scope["path"].lstrip("/\\")
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            # Lax, as a link from elsewhere leads here; there is nothing that a request changes.
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax", path="/")
            return answer
        cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        if cookie is None or not self._is_token(cookie.value):
            return _plain("A token is needed; use the address that was printed.", 401)
        return None

    def _is_host(self, header: str) -> bool:
        host = header.lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if is_loopback(host):
            return True
        if self._token is None:
            return False
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host in self._names
        return True

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())


def _plain(text: str, status: int) -> Response:
    return PlainTextResponse(text + "\n", status)
