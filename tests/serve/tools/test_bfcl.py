"""The leaderboard's AST check: every trap in a hand-made file of cases, and the benchmark's own ground truth scores 100 %."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zipfile

import pytest

from armillary.core.errors import FormatError, InputError
from armillary.models.hub import _download_command
from armillary.serve.tools.bfcl import Case, check, read_output, score
from armillary.serve.tools.bfcl_files import answer_file, category, question_files, read_cases, read_results, result_row

FUNCTION = {
    "name": "geo.find",
    "description": "Find places.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"},
            "radius": {"type": "float"},
            "limit": {"type": "integer"},
            "open": {"type": "boolean"},
            "kinds": {"type": "array", "items": {"type": "string"}},
            "box": {"type": "tuple", "items": {"type": "float"}},
            "filter": {"type": "dict", "properties": {}},
            "stops": {"type": "array", "items": {"type": "dict"}},
            "unit": {"type": "any"},
        },
        "required": ["city"],
    },
}
OTHER = {"name": "ping", "description": "", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": []}}


def case(kind="simple", functions=(FUNCTION,), answers=({"geo.find": {"city": ["New York, NY", "NYC"]}},)):
    return Case("x", kind, (), tuple(functions), tuple(answers))


def accepts(**values):
    return case(answers=({"geo.find": {"city": ["Ulm"], **values}},))


def call(**arguments):
    return [("geo.find", {"city": "Ulm", **arguments})]


# (case, calls, right)
TABLE = [
    # names
    (case(), [("geo.find", {"city": "NYC"})], True),
    (case(), [("geo_find", {"city": "NYC"})], True),
    (case(), [("geo.look", {"city": "NYC"})], False),
    (case(), [("find", {"city": "NYC"})], False),
    # how many calls
    (case(), [], False),
    (case(), None, False),
    (case(), [("geo.find", {"city": "NYC"})] * 2, False),
    # strings: spaces, case and , . / - _ * ^ do not count; ' is "
    (case(), [("geo.find", {"city": "new york ny"})], True),
    (case(), [("geo.find", {"city": "NEW-YORK_NY."})], True),
    (case(), [("geo.find", {"city": "n*y^c/"})], True),
    (case(), [("geo.find", {"city": "New York; NY"})], False),
    (case(), [("geo.find", {"city": "York"})], False),
    (accepts(unit=["it's"]), call(unit='it"s'), True),
    (accepts(unit=["m"]), call(unit=""), False),
    # required, unknown and optional parameters
    (case(), [("geo.find", {})], False),
    (case(), [("geo.find", {"city": "NYC", "zoom": 3})], False),
    (case(), [("geo.find", {"city": "NYC", "limit": 3})], False),
    (accepts(limit=[3, ""]), call(), True),
    (accepts(limit=[3, ""]), call(limit=3), True),
    (accepts(limit=[3]), call(), False),
    (accepts(limit=[3, ""]), call(limit=4), False),
    (accepts(limit=[3, ""]), call(limit=""), False),  # "" may be left out, not said
    # integers, floats and booleans
    (accepts(radius=[5.0]), call(radius=5.0), True),
    (accepts(radius=[5.0]), call(radius=5), True),
    (accepts(radius=[5]), call(radius=5.0), True),
    (accepts(radius=[5]), call(radius=5), True),
    (accepts(radius=[5.0]), call(radius="5.0"), False),
    (accepts(radius=[1.0]), call(radius=True), False),
    (accepts(limit=[3]), call(limit=3.0), False),
    (accepts(limit=[1]), call(limit=True), False),
    (accepts(limit=[3]), call(limit="3"), False),
    (accepts(open=[True]), call(open=True), True),
    (accepts(open=[True]), call(open=1), False),
    (accepts(open=[True]), call(open="true"), False),
    (accepts(open=[False, ""]), call(open=True), False),
    # lists and tuples
    (accepts(kinds=[["cafe", "bar"]]), call(kinds=["Cafe", "BAR"]), True),
    (accepts(kinds=[["cafe", "bar"]]), call(kinds=["bar", "cafe"]), False),
    (accepts(kinds=[["cafe", "bar"], ["bar", "cafe"]]), call(kinds=["bar", "cafe"]), True),
    (accepts(kinds=[["cafe"]]), call(kinds="cafe"), False),
    (accepts(kinds=[["cafe"]]), call(kinds=[1]), False),
    (accepts(kinds=[["cafe"]]), call(kinds=[]), False),
    (accepts(kinds=[["cafe"], ""]), call(kinds=[]), True),
    (accepts(kinds=[["cafe"]]), call(kinds=("cafe",)), False),
    (accepts(box=[[1.0, 2.5]]), call(box=(1.0, 2.5)), True),
    (accepts(box=[[1.0, 2.5]]), call(box=[1.0, 2.5]), True),
    (accepts(box=[[1.0, 2.5]]), call(box=[1, 2.5]), False),  # items are not converted
    (accepts(box=[[1, 2]]), call(box=[1, 2]), True),  # but may be of the accepted items' type
    # dicts, and lists of dicts
    (accepts(filter=[{"a": ["X y"], "b": [1, ""]}]), call(filter={"a": "xy"}), True),
    (accepts(filter=[{"a": ["X y"], "b": [1, ""]}]), call(filter={"a": "xy", "b": 1}), True),
    (accepts(filter=[{"a": ["X y"], "b": [1]}]), call(filter={"a": "xy"}), False),
    (accepts(filter=[{"a": ["X y"]}]), call(filter={"a": "xy", "c": 1}), False),
    (accepts(filter=[{"a": ["X y"]}]), call(filter={"a": "z"}), False),
    (accepts(filter=[{"a": [1]}, {"a": [2]}]), call(filter={"a": 2}), True),
    (accepts(filter=[{"a": [1]}]), call(filter=[1]), False),
    (accepts(stops=[[{"at": ["A"]}, {"at": ["B"]}]]), call(stops=[{"at": "a"}, {"at": "b"}]), True),
    (accepts(stops=[[{"at": ["A"]}, {"at": ["B"]}]]), call(stops=[{"at": "b"}, {"at": "a"}]), False),
    (accepts(stops=[[{"at": ["A"]}]]), call(stops=[{"at": "a"}, {"at": "a"}]), False),
    # a variable where a value was expected
    (accepts(limit=["n_max"]), call(limit="n_max"), True),
    (accepts(limit=["n_max"]), call(limit="n max"), False),
    # several functions, one call
    (case("multiple", (OTHER, FUNCTION)), [("geo.find", {"city": "NYC"})], True),
    (case("multiple", (OTHER, FUNCTION)), [("ping", {"n": 1})], False),
    # several calls, in any order, each answer once
    (case("parallel", (OTHER, FUNCTION), ({"ping": {"n": [1]}}, {"ping": {"n": [2]}})), [("ping", {"n": 2}), ("ping", {"n": 1})], True),
    (case("parallel", (OTHER, FUNCTION), ({"ping": {"n": [1]}}, {"ping": {"n": [2]}})), [("ping", {"n": 1}), ("ping", {"n": 1})], False),
    (case("parallel", (OTHER,), ({"ping": {"n": [1]}}, {"ping": {"n": [1]}})), [("ping", {"n": 1}), ("ping", {"n": 1})], True),
    (case("parallel", (OTHER,), ({"ping": {"n": [1]}}, {"ping": {"n": [2]}})), [("ping", {"n": 1})], False),
    # no function fits, or some does
    (case("irrelevance", answers=()), [], True),
    (case("irrelevance", answers=()), None, True),
    (case("irrelevance", answers=()), [("geo.find", {"city": "NYC"})], False),
    (case("relevance", answers=()), [("geo.find", {})], True),
    (case("relevance", answers=()), [], False),
]


def test_there_are_sixty_of_them():
    assert len(TABLE) >= 60


@pytest.mark.parametrize("number", range(len(TABLE)))
def test_every_trap(number):
    question, calls, right = TABLE[number]
    assert (check(question, calls) is None) is right, check(question, calls)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[geo.find(city='a', limit=-3), ping()]", [("geo.find", {"city": "a", "limit": -3}), ("ping", {})]),
        ("geo.find(city='a')", [("geo.find", {"city": "a"})]),
        ("```\n[ping(n=2+3)]\n```", [("ping", {"n": 5})]),
        ("[ping(n=(1, 'b'), m=[{'a': None}])]", [("ping", {"n": (1, "b"), "m": [{"a": None}]})]),
        ("[ping(n=n_max, m=f(1), o=d['k'])]", [("ping", {"n": "n_max", "m": "f(1)", "o": "d['k']"})]),
        ("I cannot do that.", None),
        ("[ping(3)]", None),
        ("[ping(n=1, n=2)]", None),
        ("[ping(n=9**9**9)]", None),
        ("", []),
    ],
)
def test_calls_in_text_are_read_without_running_anything(text, calls):
    assert read_output(text) == calls


def test_files_of_the_benchmark(tmp_path):
    questions, answers = tmp_path / "BFCL_v4_simple_python.json", tmp_path / "answers.json"
    rows = [{"id": f"simple_{i}", "question": [[{"role": "user", "content": "?"}]], "function": [FUNCTION]} for i in range(2)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    answers.write_text("\n".join(json.dumps({"id": f"simple_{i}", "ground_truth": [{"geo.find": {"city": [f"c{i}"]}}]}) for i in range(2)))
    cases = read_cases(questions, answers)
    result = score(cases, {"simple_0": [("geo.find", {"city": "C 0"})], "simple_1": [("geo.find", {"city": "c0"})]})
    assert (result.total, result.accuracy, result.errors) == (2, 0.5, {"simple_1": "city is 'c0'"})
    parameters = cases[0].tools()[0]["function"]["parameters"]
    assert (parameters["type"], parameters["properties"]["radius"], parameters["properties"]["box"]["type"]) == (
        "object",
        {"type": "number"},
        "array",
    )
    with pytest.raises(FormatError, match="no accepted answer"):
        read_cases(questions)
    for name, why in (("simple_java", "written in Java$"), ("simple_javascript", "JavaScript"), ("memory", "agent"), ("multi_turn_base", "several turns"), ("x", "none of")):  # fmt: skip
        with pytest.raises(InputError) as error:
            read_cases(tmp_path / f"BFCL_v4_{name}.json")
        assert re.search(why, error.value.problem)
    rows[0]["question"] *= 2
    questions.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FormatError, match="not one turn"):
        read_cases(questions, answers)
    questions.write_text("{")
    with pytest.raises(FormatError, match="line 1"):
        read_cases(questions, answers)


def test_a_parameter_may_have_a_schemas_words_for_its_name():
    named = {"type": "dict", "properties": {"format": {"type": "float", "default": 1, "format": "x"}, "type": {"type": "dict"}}}
    (tool,) = case(functions=({"name": "f", "parameters": named},)).tools()
    assert tool["function"]["parameters"]["properties"] == {"format": {"type": "number"}, "type": {"type": "object"}}


def test_results_are_read_as_they_are_written(tmp_path):
    file = tmp_path / "result.json"
    calls = [("geo.find", {"city": "é"}), ("ping", {})]
    rows = [
        result_row("a", calls, ""),
        result_row("b", [], "No."),
        {"id": "c", "result": "[ping(n=1)]"},
        {"id": "d", "result": [{"f": "["}]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_results(file) == {"a": calls, "b": None, "c": [("ping", {"n": 1})], "d": None}


def test_a_folders_categories_and_their_answers(tmp_path):
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_live_irrelevance.json", "possible_answer/BFCL_v4_simple_python.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    live, simple = question_files(tmp_path)
    assert (category(live), category(simple)) == ("live_irrelevance", "simple_python")
    assert (answer_file(live, None), answer_file(simple, None)) == (None, tmp_path / "possible_answer" / simple.name)
    assert question_files(tmp_path, ["simple_python"]) == question_files(simple) == [simple]
    with pytest.raises(InputError, match="live_irrelevance, simple_python"):
        question_files(tmp_path, ["simple"])


WHEEL = ("bfcl-eval==2026.3.23", "bfcl_eval-2026.3.23-py3-none-any.whl", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")
CATEGORIES = [
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
]


# A required parameter without an accepted value, or accepted answers with a parameter that the function lacks: the leaderboard's own
# checker takes no answer to these either.
UNANSWERABLE = {"live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"}


@pytest.mark.slow
def test_the_benchmarks_own_ground_truth_scores_all_and_a_wrong_argument_nothing(tmp_path):
    requirement, file, sha256 = WHEEL
    subprocess.run(_download_command(requirement, tmp_path), check=True, capture_output=True, stdin=subprocess.DEVNULL)
    if (tmp_path / file).exists():  # uv leaves the files instead
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == sha256
        with zipfile.ZipFile(tmp_path / file) as wheel:  # its data is read, nothing of it is installed or run
            for category in CATEGORIES:
                wheel.extract(f"bfcl_eval/data/BFCL_v4_{category}.json", tmp_path)
                wheel.extract(f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json", tmp_path)
    total, wrong = 0, set()
    for category in CATEGORIES:
        data = tmp_path / "bfcl_eval" / "data"
        cases = read_cases(data / f"BFCL_v4_{category}.json", data / "possible_answer" / f"BFCL_v4_{category}.json")
        truth = {
            case.id: [(name, _first(values, case, name)) for answer in case.answers for name, values in answer.items()] for case in cases
        }
        wrong |= score(cases, truth).errors.keys()
        broken = {id: [(name, {**arguments, "no such parameter": 1}) for name, arguments in calls] for id, calls in truth.items()}
        assert score(cases, broken).accuracy == 0
        assert score(cases, {id: [*calls, *calls] for id, calls in truth.items()}).accuracy == 0
        assert score(cases, {}).accuracy == 0
        total += len(cases)
    assert (total, wrong) == (2351, UNANSWERABLE)


def _first(values, case, name):
    """The first accepted value of each parameter that the function has (some answers allow for others); where "" must be given, the empty one."""
    described = next(function for function in case.functions if function["name"] == name)["parameters"]
    given = {}
    for parameter, accepted in values.items():
        said = [one for one in accepted if one != ""] or (
            [_empty(described["properties"][parameter])] if parameter in described["required"] else []
        )
        if parameter in described["properties"] and said:
            given[parameter] = _plain(said[0])
    return given


def _empty(described):
    return [] if described["type"] == "array" else ""


def _plain(value):
    if isinstance(value, dict):
        listed = {key: accepted if isinstance(accepted, list) else [accepted] for key, accepted in value.items()}
        return {key: _plain(accepted[0]) for key, accepted in listed.items() if accepted[0] != ""}
    return [_plain(one) for one in value] if isinstance(value, list) else value
