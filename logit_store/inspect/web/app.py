"""The pages of the inspector, as a Starlette application.

Each page reads what it shows and no more; figures of a whole store come from its ledger. Text of a
corpus goes through `text.readable` or `text.visible` and through a template that escapes it.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from logit_store.inspect.text import hidden, printable, readable, visible
from logit_store.inspect.web import compare_pages, pages, svg
from logit_store.inspect.web.safety import Guard
from logit_store.inspect.web.stores import Served
from schemas.errors import (
    ConfigError,
    IncompleteStoreError,
    RetortError,
    StorageError,
    StoreNotFoundError,
)

_PACKAGE = "logit_store.inspect.web"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def make_app(
    stores: Sequence[Served], token: str | None = None, names: Sequence[str] = (), port: int = 0
) -> ASGIApp:
    """The application, guarded: `token`, `names` and `port` are as in `safety.Guard`."""
    application = _Pages(stores)
    return Guard(application.app, token, names, port)


@cache
def _static() -> dict[str, bytes]:
    """The package's own files by name: nothing else is ever read for a request to /static."""
    folder = resources.files(_PACKAGE) / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@cache
def _version() -> str:
    digest = hashlib.sha256()
    for name, raw in sorted(_static().items()):
        digest.update(name.encode() + raw)
    return digest.hexdigest()[:12]


class _Pages:
    """The routes, over the stores in the order in which they were named."""

    def __init__(self, stores: Sequence[Served]):
        self.stores = list(stores)
        self._templates = Environment(
            loader=PackageLoader(_PACKAGE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "visible": visible,
            "printable": printable,
            "readable": readable,
            "hidden": hidden,
            "size": pages.size,
            "duration": pages.duration,
        }
        self._templates.globals |= {
            "version": _version(),
            "meter": svg.meter,
            "stores": self.stores,
            "link": self._link,
        }
        for name in self._templates.list_templates():
            # Compiled now rather than when the first page is asked for.
            self._templates.get_template(name)
        store = "/s/{store:int}"
        self.app = Starlette(
            routes=[
                Route("/", self.home),
                Route("/static/{name}", self.static),
                Route(store, self._page(pages.overview, "overview.html")),
                Route(f"{store}/figures", self._page(pages.figures, "figures.html")),
                Route(f"{store}/shards", self._page(pages.shard_map, "shards.html")),
                Route(f"{store}/shard/{{shard:int}}", self._page(pages.shard, "shard.html")),
                Route(f"{store}/progress", self._page(pages.progress, "progress.html")),
                Route(f"{store}/sequence", self.go_to_sequence),
                Route(
                    f"{store}/sequence/{{sequence:int}}",
                    self._page(pages.sequence, "sequence.html"),
                ),
                Route(
                    f"{store}/sequence/{{sequence:int}}/position/{{position:int}}",
                    self._page(pages.position, "position.html"),
                ),
                Route(f"{store}/search", self._page(pages.search, "search.html")),
                Route(f"{store}/find", self._page(pages.find, "find.html")),
                Route(f"{store}/compare", self._page(compare_pages.compare, "compare.html")),
                Route(
                    f"{store}/compare/{{sequence:int}}/position/{{position:int}}",
                    self._page(compare_pages.position, "compare_position.html"),
                ),
            ],
            exception_handlers={RetortError: self.failed, HTTPException: self.refused},
        )

    def home(self, request: Request) -> Response:
        if len(self.stores) == 1:
            return RedirectResponse("/s/0", 303)
        return self._render(request, "home.html", pages.home(self.stores))

    def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        raw = _static().get(name)
        if raw is None:
            raise HTTPException(404)
        media = _TYPES.get(name[name.rfind(".") :], "text/plain")
        return Response(
            raw, media_type=media, headers={"cache-control": "public, max-age=31536000, immutable"}
        )

    def go_to_sequence(self, request: Request) -> Response:
        """Where the form that asks for a number leads."""
        store = self._store(request)
        number = pages.whole(request.query_params.get("number", "0"), "number")
        query = {k: v for k, v in request.query_params.items() if k == "targets"}
        return RedirectResponse(self._link(self._index(store), f"/sequence/{number}", **query), 303)

    def failed(self, request: Request, error: Exception) -> Response:
        """A foreseeable error as a page that says it."""
        status = 500
        if isinstance(error, StoreNotFoundError | IncompleteStoreError):
            status = 404
        elif isinstance(error, ConfigError):
            status = 400
        elif isinstance(error, StorageError):
            status = 502
        return self._error(request, status, str(error))

    def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "There is no such page." if error.status_code == 404 else error.detail
        return self._error(request, error.status_code, what)

    def _error(self, request: Request, status: int, message: str) -> Response:
        context = {"message": message, "status": status, "store": None, "index": None}
        index = request.path_params.get("store")
        if isinstance(index, int) and index < len(self.stores):
            context |= {"store": self.stores[index], "index": index}
        return self._render(request, "error.html", context, status)

    def _page(
        self, make: Callable[[Served, Request, Sequence[Served]], dict[str, Any]], template: str
    ) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            store = self._store(request)
            context = make(store, request, self.stores)
            return self._render(
                request, template, {"store": store, "index": self._index(store)} | context
            )

        return endpoint

    def _store(self, request: Request) -> Served:
        index = request.path_params["store"]
        if index >= len(self.stores):
            raise HTTPException(404)
        return self.stores[index]

    def _index(self, store: Served) -> int:
        return self.stores.index(store)

    def _render(
        self, request: Request, template: str, context: dict[str, Any], status: int = 200
    ) -> Response:
        is_part = request.headers.get("x-part") == "1"
        text = self._templates.get_template(template).render(
            part=is_part, path=request.url.path, **context
        )
        return HTMLResponse(text, status)

    @staticmethod
    def _link(index: int, path: str = "", **query: Any) -> str:
        """An address within a store; parameters that are None are left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return f"/s/{index}{path}" + (f"?{urlencode(given)}" if given else "")
