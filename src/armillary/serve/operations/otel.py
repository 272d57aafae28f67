"""Requests as OpenTelemetry spans: one a request, with its time in the queue, in the prompt and in the answer as children."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from armillary.core.clock import Clock
from armillary.core.errors import MissingDependencyError
from armillary.serve.request import Event, Request

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

NAME = "armillary.serve"


def check_installed() -> None:
    """Raises MissingDependencyError when spans cannot be sent from here."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenTelemetry is not installed ({error.name})", "pip install 'armillary[otel]', or serve without --otel"
        ) from error


def exporting_to(endpoint: str) -> Tracer:
    """A tracer whose spans go to `endpoint` (OTLP over HTTP) in batches, from a thread of its own, and are dropped when nobody is there.

    `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are heeded.
    """
    check_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create())  # flushes at the process' end
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer(NAME)


class RequestSpans:
    """An observer that makes the spans when a request ends, from the instants that the engine noted with it: serving waits for nothing.

    Names and attributes are those of OpenTelemetry's semantic conventions for generative AI where it has one. No text is in them.
    A `traceparent` that the client sent is the parent of its requests' spans.
    """

    def __init__(self, tracer: Tracer, model: str, clock: Clock) -> None:
        self._tracer = tracer
        self._model = model
        self._epoch = time.time_ns() - clock.now()  # ns from the engine's clock to the time of day
        self._parents: dict[Request, Any] = {}

    def submitted(self, request: Request) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from armillary.serve.http.exchange import current

        exchange = current()
        headers = dict(exchange.headers) if exchange is not None else {}
        self._parents[request] = TraceContextTextMapPropagator().extract(headers)

    def event(self, request: Request, event: Event) -> None:
        if event.finish_reason is not None and request in self._parents:
            self._record(request, event, self._parents.pop(request))

    def _record(self, request: Request, event: Event, parent: Any) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        arrival, end = request.arrival or event.at, request.finished or event.at
        span = self._tracer.start_span(
            f"text_completion {self._model}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=self._epoch + arrival,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "gen_ai.response.id": request.id,
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
                "gen_ai.request.temperature": request.sampling.temperature,
                "gen_ai.usage.input_tokens": len(request.prompt),
                "gen_ai.usage.output_tokens": len(request.output),
                "gen_ai.response.finish_reasons": [event.finish_reason or ""],
                "armillary.cached_tokens": request.reused,
                "armillary.preemptions": request.preemptions,
            },
        )
        if event.finish_reason == "error":
            span.set_status(Status(StatusCode.ERROR, type(event.error).__name__))
        inside = set_span_in_context(span)
        instants = [arrival, request.first_scheduled, request.first_token]
        for index, name in enumerate(("queue", "prefill", "decode")):
            start = instants[index]
            if start is None:
                break
            stop = next((at for at in instants[index + 1 :] if at is not None), end)
            child = self._tracer.start_span(name, context=inside, start_time=self._epoch + start)
            child.end(end_time=self._epoch + stop)
        span.end(end_time=self._epoch + end)
