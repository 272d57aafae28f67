"""`armillary serve`: a model behind an OpenAI-compatible server with a chat page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, ServerFlags, settle

if TYPE_CHECKING:
    from armillary.serve.http.server import Server
    from armillary.serve.service import Service


def serve(
    model: Annotated[str | None, Parameter(help="A name (smollm2), a .gguf file or a model folder.")] = None,
    /,
    *,
    config: ConfigFile = None,
    server: ServerFlags = ServerFlags(),  # noqa: B008 (frozen)
    engine: EngineFlags = EngineFlags(),  # noqa: B008
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, with a chat page at /."""
    from armillary.cli.launch import launch
    from armillary.cli.terminal import note
    from armillary.core.trace import Trace
    from armillary.serve.http.server import check_address

    settled = settle(model, engine, server, config)
    refuse_open_door(settled.value.server)
    check_address(settled.value.server.host, settled.value.server.port)
    running = launch(settled, Trace("serve", capacity=200_000))
    with_http = http_server(running.service, settled.value.server)
    running.engine.start()
    try:
        print(f"serving {running.service.model_name} at {with_http.url} (API at {with_http.url}/v1); Ctrl-C stops", flush=True)
        with_http.run()
    finally:
        running.engine.stop()
        note("stopped")


def refuse_open_door(server: Any) -> None:
    """A server that others can reach needs a key, or an explicit word that it shall not. Raises InputError."""
    from armillary.cli.terminal import note
    from armillary.core.errors import InputError

    if is_loopback(server.host) or server.api_key is not None:
        return
    if not server.allow_public:
        raise InputError(
            f"{server.host} can be reached from other machines, and no API key is set",
            "set ARMILLARY_SERVER__API_KEY (or --api-key), listen on 127.0.0.1, or say --allow-public",
            field="server.host",
        )
    note(f"WARNING: anyone who can reach {server.host} can use this server: no API key is set (--allow-public)")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    import ipaddress

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def http_server(service: Service, server: Any) -> Server:
    """The server on its port, not running yet. Raises InputError when the port is taken."""
    from armillary.serve.http.guards import LOOPBACK_HOSTS
    from armillary.serve.http.server import Server
    from armillary.web.app import create_app

    hosts = LOOPBACK_HOSTS if is_loopback(server.host) else ("*",)
    app = create_app(service, api_key=server.api_key, allowed_hosts=hosts)
    return Server(app, server.host, server.port, end_answers=service.engine.stop)
