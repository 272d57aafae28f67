"""`armillary serve`: a model behind an OpenAI-compatible server with a chat page, or an encoder behind its embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, FleetFlags, ServerFlags, settle

if TYPE_CHECKING:
    from armillary.serve.http.operations import Operations
    from armillary.serve.http.server import Server
    from armillary.serve.service import Service


def serve(
    model: Annotated[str | None, Parameter(help="A name (smollm2), a .gguf file or a model folder.")] = None,
    /,
    *,
    config: ConfigFile = None,
    plan: Annotated[
        Path | None,
        Parameter(help="A plan of `armillary plan serve` or `plan offload`: its model, engine and replicas, if its hardware is here."),
    ] = None,
    server: ServerFlags = ServerFlags(),  # noqa: B008 (frozen)
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    fleet: FleetFlags = FleetFlags(),  # noqa: B008
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, with a chat page at /."""
    from armillary.cli.launch import launch, start
    from armillary.cli.operations import key_ring, operations
    from armillary.cli.serve_encoder import names_encoder, serve_encoder
    from armillary.cli.terminal import note
    from armillary.core.trace import Trace
    from armillary.serve.http.server import check_address

    settled = settle(model, engine, server, config, planned(plan), fleet)
    refuse_open_door(settled.value.server)
    check_address(settled.value.server.host, settled.value.server.port)
    key_ring(settled.value.server)
    if names_encoder(settled):
        serve_encoder(settled)
        return
    trace = Trace("serve", capacity=200_000)
    operating = operations(settled.value.server, trace)
    running = launch(settled, trace, replicas=True)
    with_http = http_server(running.service, settled.value.server, operating)
    start(running)
    try:
        print(f"serving {running.service.model_name} at {with_http.url} (API at {with_http.url}/v1); Ctrl-C stops", flush=True)
        with_http.run()
    finally:
        running.engine.stop()
        note("stopped")


def planned(path: Path | None) -> dict[str, Any]:
    """What a plan says, by dotted keys of the configuration. Raises InputError when its hardware is not here."""
    from armillary.cli.terminal import note

    if path is None:
        return {}
    from armillary.plan import offload_file
    from armillary.plan.file import engines, executable, load, machines

    if offload_file.is_one(path):
        offloading = offload_file.load(path)
        work = offloading.workload
        told = offload_file.executable(offloading)
        note(
            f"planned for {work.block} prompts of {work.prompt} tokens and answers of {work.answer} at a time, {offloading.engine.offload}"
        )
        return told
    plan = load(path)
    told = executable(plan)
    apart = plan.disaggregation
    what = f"{plan.replicas} x {plan.hardware.device}"
    if apart is not None:
        what = f"{apart.prefill.count} prefill and {apart.decode.count} decode workers on {plan.hardware.device}"
    note(f"planned for {what}, {plan.workload.rate:g} requests a second of {plan.workload.lengths}, {plan.workload.slo}")
    if (there := machines(plan)) > 1:
        note(
            f"WARNING: planned for {there} machines, and all {engines(plan)} engines share this one: the planned rate will not hold "
            f"(--cluster {engines(plan)}xprofile.json plans for parts of one machine)"
        )
    return told


def refuse_open_door(server: Any) -> None:
    """A server that others can reach needs a key, or an explicit word that it shall not. Raises InputError."""
    from armillary.cli.terminal import note
    from armillary.core.errors import InputError

    if is_loopback(server.host) or server.guarded:
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


def http_server(service: Service, server: Any, operations: Operations | None = None) -> Server:
    """The server on its port, not running yet. `operations` are those of `server` when they are made already.

    Raises InputError when the port is taken.
    """
    from armillary.cli import operations as operating
    from armillary.cli.terminal import note
    from armillary.serve.http.guards import LOOPBACK_HOSTS
    from armillary.serve.http.server import Server
    from armillary.web.app import create_app

    hosts = LOOPBACK_HOSTS if is_loopback(server.host) else ("*",)
    operations = operations if operations is not None else operating.operations(server, None)
    operations = replace(operations, observers=operating.observers(server, service))
    app = create_app(
        service, simulations=server.simulations, api_key=operating.key_ring(server), allowed_hosts=hosts, operations=operations
    )
    return Server(
        app,
        server.host,
        server.port,
        end_answers=service.engine.stop,
        drain=operations.drain,
        drain_seconds=server.drain_seconds,
        on_drain=lambda requests: note(f"draining: {requests} requests in flight, at most {server.drain_seconds:g} s"),
    )
