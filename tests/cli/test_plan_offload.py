"""`armillary plan offload`: what is planned for this machine is carried out by the engine, with the tokens of a model that is not offloaded."""

import json
from datetime import UTC, datetime

import pytest

from armillary.cli.main import MISUSED, run
from armillary.cli.serve import planned
from armillary.cli.settings import settle
from armillary.cluster.machine import describe
from armillary.cluster.profile import Identity, MemoryRate, ProductRate, Profile
from armillary.plan.offload_file import load
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams


@pytest.fixture
def profile(tmp_path):
    rates = {"read": 1e10, "copy": 2e10}
    made = Profile(
        machine=Identity.of(describe()),
        taken=datetime.now(UTC).isoformat(),
        seconds=1,
        load_before=0,
        load_after=0,
        others=0,
        products=(ProductRate(library="torch", dtype="fp32", threads=1, m=64, n=100, k=100, seconds=1e-4),),
        memory=tuple(MemoryRate(operation=name, threads=1, size=10**8, bandwidth=rate) for name, rate in rates.items()),  # type: ignore[arg-type]
    )
    made.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


DISK = ["--disk", "50MB", "--disk-read", "1GB", "--disk-write", "1GB"]


@pytest.mark.parametrize(
    ("compress", "memory", "beside", "where"),
    [
        ("none", "170KB", ["--memory", "100MB"], "weights=15/85/0,cache=0/100/0"),
        ("int4", "580KB", ["--memory", "100MB"], "weights=15/85/0,cache=15/85/0"),
        ("none", "170KB", ["--memory", "60KB", *DISK], "weights=8/0/92,cache=0/0/100"),
    ],
)
def test_the_engine_carries_the_plan_out(tiny_model, profile, tmp_path, capsys, compress, memory, beside, where):
    file, page = tmp_path / "plan.toml", tmp_path / "report.html"
    shape = ["--cluster", str(profile), "--accelerator-memory", memory, "--prompt", "24", "--answer", "8", "--block", "6"]
    arguments = ["plan", "offload", str(tiny_model), *shape, *beside, "--compress", compress]
    assert run([*arguments, "--output", str(file), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "binds. Carried: " in told
    assert f"--offload-memory {memory[:-2]}000" in told
    assert "Plotly.newPlot" in page.read_text()
    plan = load(file)
    assert run([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["plan"] == json.loads(json.dumps(plan.model_dump(mode="json")))
    engine = settle(defaults=planned(file)).value.engine
    assert engine == plan.engine
    assert engine.offload.startswith(where)
    options = {name: getattr(engine, name) for name in engine.model_fields_set}
    prompts, params = (
        [[10 + 7 * i + j for j in range(24)] for i in range(engine.max_running)],
        SamplingParams(max_tokens=8, temperature=0.0),
    )
    here = [answer.tokens for answer in LLM(tiny_model, **options).generate(prompts, params)]
    if compress == "none":
        expected = [answer.tokens for answer in LLM(tiny_model, backend="torch", kv_blocks=engine.kv_blocks).generate(prompts, params)]
        assert here == expected
    assert all(0 < len(tokens) <= 8 for tokens in here)


def test_a_plan_for_a_gpu_is_refused_by_serve_and_bad_input_is_named(tiny_model, profile, tmp_path, capsys):
    file = tmp_path / "plan.toml"
    assert run(["plan", "offload", "opt-30b", "--cluster", "t4-flexgen", "--block", "16", "--output", str(file)]) == 0
    capsys.readouterr()
    assert run(["serve", "--plan", str(file)]) == MISUSED
    assert "the plan is for a t4" in capsys.readouterr().err
    for model, arguments, says in (
        ("opt-30b", ["--cluster", "t5"], "did you mean"), ("opt-31b", [], "did you mean opt-30b"), ("opt-30b", ["--memory", "much"], "is not a size"),
        (str(tiny_model), ["--cluster", str(profile)], "--accelerator-memory"),
        (str(tiny_model), ["--cluster", str(profile), "--accelerator-memory", "1GB", "--disk-read", "1GB"], "none of it may be filled"), ("mixtral-8x7b", [], "mixture of experts"), ("opt-30b", ["--block", "0"], "give 1 to"), ("opt-30b", ["--disk-read", "0"], "0 bytes a second"),
        (str(tiny_model), ["--cluster", str(profile), "--accelerator-memory", "10KB"], "of the accelerator"), ("opt-30b", ["--output", "/nowhere/x"], "does not exist"),
    ):  # fmt: skip
        assert run(["plan", "offload", model, *arguments]) == MISUSED
        assert says in capsys.readouterr().err
