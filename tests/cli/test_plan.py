"""`armillary plan serve`: a choice with its numbers, a file, a page, and words for what cannot be."""

import json

import pytest

from armillary.cli.main import MISUSED, run
from armillary.plan.file import load

SMALL = [
    "--cluster",
    "h100,a100",
    "--tp",
    "1,3",
    "--pp",
    "1",
    "--budgets",
    "512",
    "--running",
    "32",
    "--lengths",
    "400+8",
    "--keep",
    "1",
    "--disaggregate",
    "never",
]


def test_a_plan_with_its_numbers_its_file_and_its_page(capsys, tmp_path):
    file, page = tmp_path / "plan.toml", tmp_path / "report.html"
    arguments = ["plan", "serve", "llama-2-7b", "--slo", "ttft=300ms,tpot=50ms", "--rate", "20", *SMALL]
    assert run([*arguments, "--output", str(file), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "replicas" in told
    assert "cannot be laid out so; such as 3 x h100" in told
    assert f"wrote {file}" in told
    plan = load(file)
    assert plan.predicted.attainment >= 0.9
    assert plan.replicas * plan.predicted.capacity_per_replica >= 20
    assert plan.predicted.dollars_per_hour == pytest.approx(plan.replicas * plan.hardware.dollars_per_hour)
    text = page.read_text()
    assert "Plotly.newPlot" in text
    assert "<script src" not in text
    assert "ceil(20 /" in text
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["plan"] == json.loads(json.dumps(plan.model_dump(mode="json")))
    assert max(point["rate"] for point in facts["options"][0]["curve"] if point["holds"]) == plan.predicted.capacity_per_replica
    assert {one["reason"] for one in facts["pruned"]} >= {"layout"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slo", "ttft=1us", "--rate", "2"], "at best"),
        (["--slo", "ttft=1s", "--rate", "0"], "is no rate"),
        (["--slo", "tpot=90ms", "--rate", "2", "--disaggregate", "always", "--tp", "1", "--pp", "1"], "bounds one phase only"),
        (["--slo", "soon", "--rate", "2"], "no part of an objective"),
        (["--slo", "ttft=1s", "--rate", "2", "--cluster", "h1000"], "did you mean h100"),
        (["--slo", "ttft=1s", "--rate", "2", "--budgets", "many"], "whole numbers"),
        (["--slo", "ttft=1s", "--rate", "2", "--budgets", "0"], "max_batch_tokens = 0"),
        (["--slo", "ttft=1s", "--rate", "2", "--running", "99999999"], "max_running = 99999999"),
        (["--slo", "ttft=1s", "--rate", "2", "--policy", "orca", "--policies", "vllm"], "both given"),
        (["--slo", "ttft=1s", "--rate", "2", "--policies", "luck"], "luck"),
        (["--slo", "ttft=1s", "--rate", "2", "--router", "luck"], "no routing policy"),
        (["--slo", "ttft=1s", "--rate", "2", "--speculate", "ngram"], "give --acceptance"),
        (["--slo", "ttft=1s", "--rate", "2", "--speculate", "ngram", "--acceptance", "2"], "a share such as 0.7"),
        (["--slo", "ttft=1s", "--rate", "2", "--output", "/nowhere/plan.toml"], "does not exist"),
    ],
)
def test_what_cannot_be_is_named(capsys, arguments, says):
    assert run(["plan", "serve", "llama-2-7b", *arguments]) == MISUSED
    assert says in capsys.readouterr().err


def test_prompts_and_answers_on_instances_of_their_own(capsys, tmp_path):
    file, page = tmp_path / "plan.toml", tmp_path / "report.html"
    arguments = [
        "plan",
        "serve",
        "llama-2-7b",
        "--slo",
        "ttft=200ms,tpot=40ms",
        "--rate",
        "20",
        "--cluster",
        "h100",
        "--tp",
        "1",
        "--pp",
        "1",
    ]
    arguments += ["--budgets", "512", "--running", "32", "--lengths", "400+8", "--tolerance", "0.5", "--disaggregate", "always"]
    assert run([*arguments, "--output", str(file), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "1 x 1 h100-sxm for prompts and 1 x 1 for answers" in told
    assert "a request over" in told
    plan = load(file)
    assert plan.disaggregation.prefill.count == plan.disaggregation.decode.count == 1
    assert plan.predicted.dollars_per_hour == pytest.approx(2 * plan.hardware.dollars_per_hour)
    assert "for prompts, 1 x 1 for answers over" in page.read_text()


def test_a_recorded_trace(capsys, tmp_path):
    trace = tmp_path / "monday.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{place / 2},400,8\n" for place in range(60)))
    arguments = ["plan", "serve", "llama-2-7b", "--slo", "ttft=300ms,tpot=50ms", "--trace", str(trace), "--disaggregate", "never"]
    assert run([*arguments, "--speed", "3", "--cluster", "h100", "--tp", "1", "--pp", "1", "--budgets", "512", "--running", "32"]) == 0
    told = capsys.readouterr().out
    assert "60 requests of monday.csv at 6 a second 100.0%" in told
    assert "the trace came at 2 a second: this is 3 times as fast" in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --rate"),
        (["--rate", "2", "--speed", "2"], "give --trace"),
        (["--rate", "2", "--trace", "x.csv"], "its own rate"),
        (["--lengths", "code", "--trace", "x.csv"], "its own lengths"),
        (["--trace", "/nowhere.csv"], "/nowhere.csv"),
        (["--trace", "x.csv", "--speed", "0"], "0 times as fast"),
    ],
)
def test_traces_and_rates_that_say_nothing_together(capsys, arguments, says):
    assert run(["plan", "serve", "llama-2-7b", "--slo", "ttft=1s", *arguments]) == MISUSED
    assert says in capsys.readouterr().err


def test_a_model_that_fits_nowhere(capsys):
    assert (
        run(["plan", "serve", "llama-2-70b", "--slo", "ttft=1s", "--rate", "2", "--cluster", "a100", "--tp", "1", "--pp", "1"]) == MISUSED
    )
    said = capsys.readouterr().err
    assert "GB more than" in said
    assert "at least" in said


def test_what_does_not_fit_is_told_where_more_stages_are_not_to_be_had(capsys):
    assert run(["plan", "serve", "falcon-180b", "--slo", "ttft=1s", "--rate", "2", "--cluster", "2xa100", "--tp", "1"]) == MISUSED
    assert "GB more than" in capsys.readouterr().err


def test_a_plan_for_this_machine_takes_what_was_measured_of_it(capsys, tiny_model, measured_profile):
    small = [
        "--tp",
        "1",
        "--pp",
        "1",
        "--budgets",
        "512",
        "--running",
        "32",
        "--lengths",
        "100+5",
        "--keep",
        "1",
        "--rank",
        "devices",
        "--tolerance",
        "0.9",
        "--json",
    ]
    arguments = ["plan", "serve", str(tiny_model), "--slo", "ttft=50ms", "--rate", "5", "--cluster", str(measured_profile), *small]
    assert run(arguments) == 0
    said = capsys.readouterr()
    plan = json.loads(said.out)["plan"]
    assert plan["provenance"]["cost_model"] == "tiny"
    assert plan["engine"]["quantize"] == "none"
    assert plan["engine"]["kv_dtype"] == "fp32"
    assert plan["predicted"]["ttft_ms_p50"] == pytest.approx(2, rel=0.02)
    with pytest.warns(UserWarning, match="durations are a roofline's"):
        assert run([*arguments, "--kv-dtype", "fp16"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["provenance"]["cost_model"].startswith("roofline")
    assert run([*arguments, "--host-us", "5"]) == MISUSED
    assert "leave --host-us out" in capsys.readouterr().err
