"""What `armillary serve` does with an encoder: embeddings and reranking instead of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from armillary.cli.terminal import note, timed

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.serve.embedder import EncoderService
    from armillary.serve.http.server import Server

CARRIED_OUT = {
    "engine": ("context", "max_batch_tokens", "max_queue", "threads"),
    "server": ("host", "port", "api_key", "keys", "allow_public", "drain_seconds", "access_log", "files", "files_limit"),
}


def names_encoder(settled: Resolved[Any]) -> bool:
    """Whether the model is an encoder; it is fetched if need be, visibly."""
    from armillary.cli.terminal import byte_progress
    from armillary.models import hub
    from armillary.models.encoder_config import is_encoder

    with byte_progress(settled.value.model) as progress:
        return is_encoder(hub.resolve(settled.value.model, progress=progress))


def serve_encoder(settled: Resolved[Any]) -> None:
    """Embeddings and reranking until Ctrl-C."""
    service = launch_encoder(settled)
    with_http = encoder_server(service, settled.value.server)
    service.start()
    try:
        print(f"serving {service.model_name} at {with_http.url} (/v1/embeddings and /rerank); Ctrl-C stops", flush=True)
        with_http.run()
    finally:
        service.stop()
        note("stopped")


def check_options(settled: Resolved[Any]) -> None:
    """Raises InputError for an option, given by anybody, that an encoder has no use for."""
    from armillary.core.errors import InputError

    for key, source in settled.provenance.items():
        section, _, name = key.partition(".")
        known = CARRIED_OUT.get(section, ())
        if name and source != "default" and name not in known:
            raise InputError(
                f"{name} ({source}) means nothing to {settled.value.model}, which is an encoder",
                f"leave it out; of these options an encoder knows {', '.join(known) or 'none'}",
                field=key,
            )


def launch_encoder(settled: Resolved[Any]) -> EncoderService:
    """Load the encoder; tells the reader each step on stderr. It is not started yet."""
    check_options(settled)
    engine = settled.value.engine
    with timed(f"loading {settled.value.model}") as done:
        import torch

        from armillary.models.encoder import load_encoder
        from armillary.serve.embedder import MAX_BATCH_TOKENS, EncoderService

        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        loaded = load_encoder(settled.value.model)
        given = settled.provenance["engine.max_batch_tokens"] != "default"
        service = EncoderService(
            loaded,
            max_tokens=engine.context,
            max_batch_tokens=engine.max_batch_tokens if given else MAX_BATCH_TOKENS,
            max_queue=engine.max_queue,
        )
        done(f"loaded {settled.value.model}")
    note(loaded.description)
    return service


def encoder_server(service: EncoderService, server: Any) -> Server:
    """The server on its port, not running yet. Raises InputError when the port is taken."""
    from armillary.cli.operations import key_ring, operations
    from armillary.cli.serve import is_loopback
    from armillary.serve.http.encoder_app import create_encoder_app
    from armillary.serve.http.guards import LOOPBACK_HOSTS
    from armillary.serve.http.server import Server

    hosts = LOOPBACK_HOSTS if is_loopback(server.host) else ("*",)
    operating = operations(server, None)
    app = create_encoder_app(service, api_key=key_ring(server), allowed_hosts=hosts, operations=operating)
    return Server(
        app,
        server.host,
        server.port,
        end_answers=service.stop,
        drain=operating.drain,
        drain_seconds=server.drain_seconds,
        on_drain=lambda answers: note(f"draining: {answers} answers in flight, at most {server.drain_seconds:g} s"),
    )
