"""`armillary simulate`: what it tells, and what it refuses before anything runs."""

import io
import json

import pytest

from armillary.cli.main import MISUSED, run
from armillary.core.trace import Trace


def test_a_workload_in_virtual_time(capsys):
    assert run(["simulate", "serve", "llama-2-7b", "--cluster", "a100", "--requests", "50", "--rate", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["requests"], facts["devices"], facts["device"]) == (50, 1, "a100-80g-sxm")
    assert 20e6 < facts["first_token"]["p50"] < 1e9
    assert 5e6 < facts["per_token"]["p50"] < 50e6
    assert facts["dollars_per_million_tokens"] > 0
    assert facts["ends"] > facts["makespan"], "which begins with the first request, not at 0"


def test_conversations_and_what_the_prefix_cache_had_of_them(capsys):
    plain = ["simulate", "serve", "llama-2-7b", "--cluster", "a100", "--sessions", "20", "--turns", "3..3", "--system-prompt", "400"]
    assert run([*plain, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["requests"], facts["workload"]["sessions"], facts["workload"]["sessions_cut"]) == (60, 20, 0)
    assert 0.6 < facts["prefix_hit_rate"] <= facts["workload"]["shared"] < 1
    assert run([*plain, "--requests", "7"]) == 0
    told = capsys.readouterr().out
    assert "7 requests" in told
    assert "had been asked or answered before" in told
    assert "of the prompts' tokens were in the prefix cache" in told


def test_stages_find_what_their_own_lanes_have_cached(capsys):
    """A turn goes to the lane that computed the turns before it, also where the router has nobody else to send it to."""
    plain = ["simulate", "serve", "llama-2-7b", "--sessions", "10", "--turns", "5..5", "--rate", "1", "--json"]
    rates = []
    for more in (["--cluster", "a100"], ["--cluster", "a100x4", "--pp", "4"]):
        assert run([*plain, *more]) == 0
        rates.append(json.loads(capsys.readouterr().out)["prefix_hit_rate"])
    assert rates[1] == pytest.approx(rates[0], abs=0.02)


def test_a_packaged_profile_names_its_device(capsys):
    assert run(["simulate", "serve", "llama-2-7b", "--profile", "a100", "--requests", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "a100-80g-sxm"


def test_a_trace_of_ours_on_other_hardware(capsys, tmp_path):
    """What was served in virtual time here is served there: the same requests by name, and what they share."""
    path, other = str(tmp_path / "real.json"), str(tmp_path / "virtual.json")
    assert run(["simulate", "serve", "llama-2-7b", "--cluster", "a100", "--sessions", "8", "--turns", "3..3", "--save", path]) == 0
    capsys.readouterr()
    assert run(["simulate", "serve", "mistral-7b", "--cluster", "h100", "--trace", path, "--save", other]) == 0
    told = capsys.readouterr().out
    assert "24 requests" in told
    assert "had been asked or answered before" in told
    assert run(["compare", path, other]) == 0
    assert "24 requests" in capsys.readouterr().out


def test_leaps_tell_the_same_and_so_does_the_same_seed(capsys, tmp_path):
    told = []
    for more in ([], [], ["--step-all"]):
        path = tmp_path / f"trace{len(told)}.json"
        arguments = [
            "simulate",
            "serve",
            "mistral-7b",
            "--requests",
            "30",
            "--rate",
            "6",
            "--lengths",
            "100+20",
            "--save",
            str(path),
            "--json",
        ]
        assert run([*arguments, *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        del facts["wall_seconds"]
        told.append((facts, path.read_bytes()))
    assert told[0] == told[1] == told[2]
    assert len(Trace.load(tmp_path / "trace0.json")) > 600


@pytest.mark.parametrize("by", [["ngram"], ["layers", "--draft-layers", "0.25"], ["model", "--draft-model", "qwen2.5-0.5b"]])
def test_drafts_in_virtual_time(capsys, by):
    facts = []
    for more in ([], ["--speculate", *by, "--acceptance", "0.9", "--draft-tokens", "4"]):
        arguments = ["qwen2.5-3b", "--requests", "20", "--rate", "2", "--lengths", "100+60"]
        assert run(["simulate", "serve", *arguments, *more, "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    plain, drafted = facts
    assert plain["drafts"] is None
    assert 2 < drafted["drafts"]["tokens_a_pass"] < 4.2
    assert drafted["iterations"] < plain["iterations"]
    assert drafted["generated_tokens"] == plain["generated_tokens"] == 1200
    assert (drafted["kv_blocks"] < plain["kv_blocks"]) == (by != ["ngram"])


def test_late_requests_are_sent_twice(capsys):
    arguments = ["llama-2-7b", "--cluster", "a100", "--replicas", "4", "--requests", "250", "--rate", "20", "--lengths", "300+20", "--json"]
    assert run(["simulate", "serve", *arguments, "--tail", "hedged", "--hedge-budget", "0.5"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["second_copies"]["hedges"] < 50
    assert facts["requests"] == 250


def test_decode_workers_draft(capsys):
    arguments = ["mistral-7b", "--cluster", "dgx-h100", "--requests", "20", "--prefill-workers", "1", "--decode-workers", "1"]
    assert run(["simulate", "serve", *arguments, "--lengths", "100+60", "--speculate", "ngram", "--acceptance", "0.9", "--json"]) == 0
    assert 2 < json.loads(capsys.readouterr().out)["drafts"]["tokens_a_pass"] < 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama-2-70b", "--cluster", "a100"], "138 GB of each, 66 GB more"),
        (["llama-2-7b", "--cluster", "h1000"], "did you mean h100"),
        (["llama-2-7b", "--rate", "0"], "no rate"),
        (["llama-2-7b", "--rate", "nan"], "no rate"),
        (["llama-2-7b", "--rate", "1e-300"], "over a century"),
        (["llama-2-7b", "--host-us", "-5"], "0 to 1,000,000"),
        (["llama-2-7b", "--host-us", "nan"], "0 to 1,000,000"),
        (["llama-2-7b", "--kv-link", "network"], "of decode workers"),
        (["llama-2-7b", "--decode-tp", "2"], "of decode workers"),
        (["llama-2-7b", "--kv-memory", "100TB"], "6,976 fit"),
        (["llama-2-7b", "--kv-memory", "1kB"], "less than one KV block of 16 tokens, 8.39 MB"),
        (["llama-2-7b", "--kv-blocks", "7000"], "6,976 fit"),
        (["llama-2-7b", "--lengths", "5000+100"], "more than the context of 4,096"),
        (["llama-2-7b", "--save", "/"], "is a folder"),
        (["llama-2-7b", "--requests", "0"], "no workload"),
        (["llama-2-7b", "--sessions", "0"], "no workload"),
        (["llama-2-7b", "--turns", "3"], "give --sessions"),
        (["llama-2-7b", "--sessions", "3", "--turns", "some"], "no session"),
        (["llama-2-7b", "--sessions", "3", "--think", "20"], "20s"),
        (["llama-2-7b", "--sessions", "3", "--system-prompt", "5000"], "no room in a context of 4,096"),
        (["llama-2-7b", "--sessions", "3", "--trace", "x.csv"], "give one of them"),
        (["llama-2-7b", "--speed", "2"], "give --trace"),
        (["llama-2-7b", "--cut"], "give --trace"),
        (["llama-2-7b", "--trace", "x.csv", "--rate", "2"], "give --speed"),
        (["llama-2-7b", "--lengths", "poems"], "conversation, code, summarization"),
        (["llama-2-7b", "--tp", "3", "--cluster", "dgx-h100"], "32 attention heads, which tensor_parallel 3 does not divide"),
        (["llama-2-7b", "--tp", "0"], "tensor_parallel is 0"),
        (["llama-2-7b", "--replicas", "0"], "give 1 to 100,000"),
        (["llama-2-7b", "--router", "luck"], "no routing policy"),
        (["llama-2-7b", "--speculate", "ngram"], "give --acceptance"),
        (["llama-2-7b", "--acceptance", "0.5"], "nobody drafts"),
        (["llama-2-7b", "--tail", "hedged"], "give at least 2"),
        (["llama-2-7b", "--adapters", "20"], "--max-loras 20"),
        (["llama-2-7b", "--adapter-rank", "8"], "nobody asks for one"),
        (["llama-2-7b", "--lora", "a=b"], "--adapters"),
        (["llama-2-7b", "--offload", "auto", "--offload-memory", "2GB"], "plan offload"),
        (["llama-2-7b", "--sparsity", "x.bin"], "is the text's"),
        (["llama-2-7b", "--replicas", "2", "--hedge-budget", "0.1"], "says nothing with tail none"),
        (["llama-2-7b", "--kv-policy", "streaming"], "--prefix-cache off"),
        (["llama-2-7b", "--kv-policy", "h2o", "--prefix-cache", "off", "--quantize", "int4"], "torch backend only"),
        (["llama-2-7b", "--speculate", "model", "--draft-model", "llama-3-8b", "--acceptance", "0.5"], "128,256 tokens"),
        (["llama-2-13b", "--cluster", "a100", "--speculate", "model", "--draft-model", "llama-2-70b", "--acceptance", "0.5"], "GB more"),
        (["llama-2-7b", "--replicas", "2", "--save", "x.json"], "trace one replica"),
        (["llama-2-7b", "--trace", "/nowhere.csv"], "/nowhere.csv"),
        (["llama-2-7b", "--context", "100000"], "4,096 tokens of llama-2-7b"),
        (["llama-2-7b", "--prefill-workers", "1"], "give at least 1 of each"),
        (["llama-2-7b", "--prefill-workers", "1", "--decode-workers", "1"], "take 2 devices, and h100 has 1"),
        (
            ["llama-2-7b", "--cluster", "dgx-h100", "--prefill-workers", "1", "--decode-workers", "1", "--replicas", "2"],
            "are both asked for",
        ),
        (
            ["llama-2-7b", "--cluster", "dgx-h100", "--prefill-workers", "1", "--decode-workers", "1", "--save", "x.json"],
            "trace one replica",
        ),
        (["llama-2-7b", "--cluster", "dgx-h100", "--prefill-workers", "1", "--decode-workers", "1", "--kv-link", "string"], "string"),
        (["nobody-knows"], "no model 'nobody-knows'"),
    ],
)
def test_what_cannot_be_is_named(capsys, arguments, says):
    assert run(["simulate", "serve", *arguments]) == MISUSED
    assert says in capsys.readouterr().err


def test_operations_as_they_were_measured(capsys):
    plain = ["simulate", "serve", "llama-2-7b", "--requests", "20", "--lengths", "512+8", "--json"]
    medians = []
    for more in ([], ["--profile", "a100"]):
        assert run([*plain, "--cluster", "a100", "--rate", "0.5", *more]) == 0
        medians.append(json.loads(capsys.readouterr().out)["first_token"]["p50"])
    assert medians[0] < medians[1] < 1.2 * medians[0]  # docs/simulation.md: the roofline says 0.91 of it
    assert run([*plain, "--cluster", "h100", "--profile", "a100"]) == MISUSED
    assert "measured on a100-80g-sxm" in capsys.readouterr().err


def test_prefill_and_decode_workers(capsys):
    plain = ["simulate", "serve", "llama-2-7b", "--cluster", "dgx-a100", "--requests", "40", "--rate", "4", "--lengths", "1000+20"]
    split = ["--prefill-workers", "2", "--decode-workers", "1", "--decode-tp", "2", "--profile", "a100"]
    told = []
    for link in ("fabric", "pcie-4"):
        assert run([*plain, *split, "--kv-link", link, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert (told[0]["devices"], told[0]["decode_layout"]["tensor_parallel"]) == (4, 2)
    assert told[0]["moved_bytes"] == 40 * 1000 * 2 * 32 * 4096 * 2
    assert (told[0]["link"], told[1]["link"]) == ("nvlink-3", "pcie-4")
    assert told[0]["first_token"] == told[1]["first_token"]
    assert told[0]["gap"]["p99"] < told[1]["gap"]["p99"]
    assert run([*plain, *split]) == 0
    assert "moved over nvlink-3" in capsys.readouterr().out


def test_the_share_that_keeps_an_objective(capsys):
    arguments = ["simulate", "serve", "llama-2-7b", "--cluster", "a100", "--requests", "30", "--rate", "3", "--slo", "ttft=120ms,tpot=50ms"]
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["slo"]["attainment"] == facts["slo"]["each"]["ttft"] < 1
    assert 0 < facts["model_flops_utilization"] < facts["busy"] <= 1
    assert run(arguments) == 0
    assert "of the requests keep the objective" in capsys.readouterr().out
    assert run([*arguments[:-1], "soon"]) == MISUSED


def test_the_curve_to_a_capacity(capsys):
    arguments = ["simulate", "capacity", "llama-2-7b", "--cluster", "a100", "--lengths", "100+2", "--tolerance", "0.5"]
    assert run([*arguments, "--slo", "ttft=200ms", "--json"]) == 0
    *curve, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    points = [line["probe"] for line in curve]
    assert last["capacity"]["rate"] == max(point["rate"] for point in points if point["holds"])
    lost = min(point["rate"] for point in points if not point["holds"])
    assert last["capacity"]["rate"] < lost <= 1.5 * last["capacity"]["rate"] * (1 + 1e-9)
    assert all(point["first_token"]["p50"] <= point["first_token"]["p"] <= point["first_token"]["p99"] for point in points)
    assert run([*arguments, "--slo", "ttft=1ms"]) == 0
    assert "nothing holds" in capsys.readouterr().out


def test_an_engine_is_watched_by_lines(capsys, monkeypatch):
    asked = [{"at": 2 * 10**9, "since": 3}, {"at": 2 * 10**9, "explain": "0"}, {"at": 10**6}]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, asked))))
    assert run(["simulate", "watch", "llama-2-7b", "--cluster", "a100", "--requests", "20", "--rate", "8", "--lengths", "400+40"]) == 0
    ready, later, story, early = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ready == {"ready": True}
    assert (later["now"], later["model"]["name"]) == (2 * 10**9, "llama-2-7b")
    assert later["iterations"][0]["index"] > 3
    assert "arrived with a prompt of 400 tokens" in story["events"][0]
    assert early["iteration"] < later["iteration"]


def test_a_program_that_wants_errors_as_json_gets_them(capsys, monkeypatch):
    monkeypatch.setenv("ARMILLARY_ERRORS", "json")
    assert run(["simulate", "serve", "llama-2-7b", "--rate", "0"]) == MISUSED
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["field"] == "rate"


def test_this_machines_own_engine(capsys, tiny_model, measured_profile):
    plain = ["simulate", "serve", str(tiny_model), "--profile", str(measured_profile)]
    assert run([*plain, "--requests", "20", "--lengths", "100+5", "--rate", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["first_token"]["p50"] == pytest.approx(2e6, rel=0.02)
    assert facts["per_token"]["p50"] == pytest.approx(1.01e6, rel=0.02)
    assert facts["kv_blocks"] == 64 * 2048 // 16  # as `serve` sizes its pool: every sequence at full length
    for more, says in (
        (["--cluster", "h100"], "leave --cluster out"),
        (["--tp", "2"], "leave --tensor-parallel out"),
        (["--host-us", "5"], "its host included"),
        (["--quantize", "int4"], "weights none, not int4"),
    ):
        assert run([*plain, *more]) == MISUSED
        assert says in capsys.readouterr().err
    assert run(["simulate", "serve", "llama-2-7b", "--profile", str(measured_profile)]) == MISUSED
    assert "no engine computes it here" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="measured with at most 512 tokens an iteration"):
        assert run([*plain, "--requests", "2", "--max-batch-tokens", "1024", "--json"]) == 0
