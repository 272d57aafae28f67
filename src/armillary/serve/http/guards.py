"""Who may talk to the server: which Host headers, which keys. Plain ASGI, before anything is read."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import current
from armillary.serve.operations.keys import KeyRing

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class HostGuard:
    """Answers only to known Host headers, so that a foreign site whose name is made to point at this machine gets nothing (DNS rebinding).

    `allowed` holds host names without port; "*" switches the guard off.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = LOOPBACK_HOSTS) -> None:
        self._app = app
        self._allowed = frozenset(host.lower() for host in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._allowed:
            host = _header(scope, b"host").decode("latin-1")
            if _without_port(host).lower() not in self._allowed:
                error = APIError(
                    403,
                    f"host {host[:200]!r} is not one that this server answers to: reach it as {sorted(self._allowed)[0]}, "
                    "or serve with the host name allowed",
                    type="permission_error",
                    code="host_not_allowed",
                )
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyGuard:
    """Asks for `Authorization: Bearer KEY`, or `x-api-key: KEY`, everywhere but on `open_paths` and below `open_prefixes`; notes whose it was."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str] = (), open_prefixes: Collection[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._open_prefixes = tuple(open_prefixes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            scheme, _, key = _header(scope, b"authorization").partition(b" ")
            if not key:  # as Anthropic's clients send it
                scheme, key = b"bearer", _header(scope, b"x-api-key")
            owner = self._keys.owner(key.strip())
            if owner is None or scheme.lower() != b"bearer":
                problem = "no API key given" if not key else "the API key is wrong"
                error = APIError(
                    401,
                    f"{problem}: send the header 'Authorization: Bearer KEY'",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response(scope["path"])(scope, receive, send)
                return
            exchange = current()
            if exchange is not None:
                exchange.key = owner.name
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or path.startswith(self._open_prefixes)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
