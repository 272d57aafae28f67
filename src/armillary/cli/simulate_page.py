"""`armillary simulate page`: the page's tab for virtual time, without a model behind it."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def page(
    *,
    port: Annotated[int, Parameter(help="Port of 127.0.0.1 to listen on; 0 takes a free one.")] = 8000,
    simulations: Annotated[int, Parameter(help="Simulations that may run at a time, each a process.")] = 2,
) -> None:
    """Choose a model, a cluster and a workload in the browser; see latencies, the capacity curve and the engine at work. This machine only."""
    from armillary.cli.terminal import note, timed
    from armillary.core.errors import InputError
    from armillary.serve.http.server import Server, check_address

    if not 1 <= simulations <= 64:
        raise InputError(f"{simulations} simulations at a time", "give 1 to 64", field="simulations")
    check_address("127.0.0.1", port)
    with timed("loading the page") as done:
        from armillary.web.app import create_simulation_app

        server = Server(create_simulation_app(simulations), port=port)
        done("loaded the page")
    try:
        print(f"virtual time at {server.url}; Ctrl-C stops", flush=True)
        server.run()
    finally:
        note("stopped")
