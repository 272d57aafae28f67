"""The server against its own /openapi.json: nothing that the schema allows or forbids gets an answer that it does not describe.

More examples than in the suite: `SCHEMATHESIS_EXAMPLES=300 pytest --timeout 0 tests/serve/operations/test_contract.py`.
"""

from __future__ import annotations

import os

import pytest
from http_world import World
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[dev]'")
from schemathesis import checks  # noqa: E402
from schemathesis.openapi.checks import UndefinedStatusCode  # noqa: E402

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "4"))
# A JSON schema cannot say which tokens a model has or what fits its context: some of what it allows is a 400, with the reason.
TOO_STRICT = [checks.positive_data_acceptance]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("contract"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def schema(world):
    return schemathesis.openapi.from_url(world.url + "/openapi.json")


def answered(operation, known: dict[str, str]) -> set[int]:
    """Ask `operation` for whatever its schema says, naming what exists where `known` has it; each answer must be as described."""
    seen: set[int] = set()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case):
        if isinstance(case.body, dict) and "model" in known:
            case.body = {**case.body, "model": known["model"]}
        case.path_parameters = {key: known.get(key, value) for key, value in (case.path_parameters or {}).items()}
        response = case.call()
        seen.add(response.status_code)
        case.validate_response(response, excluded_checks=TOO_STRICT)

    ask()
    return seen


def test_every_answer_is_described(world, schema):
    """Status, content type and body of each answer."""
    real = world.http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 3}).json()["id"]
    file = world.http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}"}).json()["id"]
    batch = world.http.post("/v1/batches", json={"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}).json()[
        "id"
    ]
    known = {"model": "typist", "model_id": "typist", "response_id": real, "request_id": real, "file_id": file, "batch_id": batch}
    statuses: dict[str, set[int]] = {}
    for operation in (found.ok() for found in schema.get_all_operations()):
        name = f"{operation.method.upper()} {operation.path}"
        statuses[name] = answered(operation, {}) | (answered(operation, known) if operation.method != "delete" else set())
    assert not {name for name, seen in statuses.items() if any(status >= 500 for status in seen)}
    looking = {name for name in statuses if name.startswith("GET") and name != "GET /debug/trace"}
    assert len(looking) >= 8
    assert {name for name in looking if 200 not in statuses[name]} == set()
    world.wait_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_an_undescribed_answer_would_be_noticed(world, schema, path):
    """The check has teeth: without the description of errors a 400 fails it."""
    case = schema[path]["POST"].Case(body={"nothing": 1}, media_type="application/json")
    response = case.call()
    case.validate_response(response, excluded_checks=TOO_STRICT)
    raw = schema[path]["POST"].definition.raw["responses"]
    errors = {status: raw.pop(status) for status in ("4XX", "5XX")}
    try:
        fresh = schemathesis.openapi.from_dict(schema.raw_schema)
        fresh.config.update(base_url=world.url)
        case = fresh[path]["POST"].Case(body={"nothing": 1}, media_type="application/json")
        with pytest.raises(BaseExceptionGroup) as failures:
            case.call_and_validate(excluded_checks=TOO_STRICT)
        assert failures.value.subgroup(UndefinedStatusCode)
    finally:
        raw.update(errors)
