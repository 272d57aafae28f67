"""Spans as the SDK's in-memory exporter gets them."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install -e '.[dev]'")

from http_world import World
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from armillary.core.clock import RealClock
from armillary.serve.http.operations import Operations
from armillary.serve.operations.otel import RequestSpans

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def exporter():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def world(tmp_path_factory, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = RequestSpans(provider.get_tracer("test"), "typist", RealClock())
    world = World(tmp_path_factory.mktemp("world"), operations=Operations(observers=(spans,)))
    yield world
    world.close()


@pytest.fixture
def spans_of(exporter):
    """The spans that an answer's requests left: (parent, {child's name: child}) each."""
    exporter.clear()

    def of(answer_id):
        spans = exporter.get_finished_spans()
        roots = [span for span in spans if span.attributes.get("gen_ai.response.id", "").partition("/")[0] == answer_id]
        inside = {root.context.span_id: {} for root in roots}
        for span in spans:
            if span.parent is not None and span.parent.span_id in inside:
                inside[span.parent.span_id][span.name] = span
        return [(root, inside[root.context.span_id]) for root in roots]

    return of


def test_a_request_is_its_queue_its_prefill_and_its_decode(world, spans_of):
    secret = "a private matter"
    answer = world.http.post(TEXT, json={"prompt": secret, "max_tokens": 5, "temperature": 0.5}).json()
    ((span, children),) = spans_of(answer["id"])
    assert span.attributes["gen_ai.usage.input_tokens"] == len(secret)
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert span.attributes["gen_ai.request.temperature"] == 0.5
    assert list(children) == ["queue", "prefill", "decode"]
    edges = [children[name].start_time for name in children] + [children["decode"].end_time]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (span.start_time, span.end_time)  # without a gap
    assert children["queue"].end_time == children["prefill"].start_time
    assert children["prefill"].end_time == children["decode"].start_time
    assert abs(edges[0] / 1e9 - answer["created"]) < 5  # in the time of day
    assert secret not in span.to_json()


def test_each_choice_has_its_own_and_the_clients_trace_is_the_parent(world, spans_of):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    answer = world.http.post(TEXT, json={"prompt": "abc", "max_tokens": 2, "n": 3}, headers=headers).json()
    spans = spans_of(answer["id"])
    assert len(spans) == 3
    for span, _ in spans:
        assert f"{span.context.trace_id:032x}" == trace
        assert f"{span.parent.span_id:016x}" == parent


def test_a_failure_is_an_error_and_what_it_did_not_come_to_has_no_span(world, spans_of, exporter):
    world.typist.failure = RuntimeError("a prompt's text could be in here")
    assert world.http.post(TEXT, json={"prompt": "abc"}).status_code == 500
    (span,) = [span for span in exporter.get_finished_spans() if span.attributes.get("gen_ai.response.id")]
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "RuntimeError"
    ((_, children),) = spans_of(span.attributes["gen_ai.response.id"])
    assert list(children) == ["queue", "prefill"]
    assert children["prefill"].end_time == span.end_time
