"""`armillary demo` measures what it ran, and leaves a report, a trace and the configuration that agree with its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

from armillary.cli.demo_prompts import PROMPTS
from armillary.cli.run_config import RunConfig
from armillary.core.config import resolve
from armillary.core.trace import Trace
from armillary.core.units import MB


@pytest.fixture(scope="module")
def long_context_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for the demo's longest prompt, which a byte-level tokenizer makes some 3,000 tokens of."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sarathi", "orca"])
def test_the_run_agrees_with_its_table(armillary: Command, long_context_model: Path, tmp_path: Path, policy: str) -> None:
    ran = armillary("demo", long_context_model, "--json", "--runs", tmp_path, "--policy", policy, "--kv-memory", "4 MB")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    raw, folder = told["raw"], Path(told["run"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "report.html", "trace.json"]

    trace = Trace.load(folder / "trace.json")
    steps = [span for span in trace.spans() if (span.lane, span.kind) == ("engine", "step")]
    lanes = {span.lane for span in trace.spans() if span.lane.startswith("request/")}
    decoded = [span for span in trace.spans() if span.lane in lanes and span.kind == "decode"]
    assert len(lanes) == raw["requests"] == len(PROMPTS) == 16
    assert len(steps) == raw["iterations"]
    assert sum(span.sizes["tokens"] for span in steps) >= raw["prompt_tokens"] + len(decoded)
    assert max(span.sizes["blocks_used"] for span in steps) == raw["kv_blocks_peak"] <= raw["kv_blocks_total"]
    assert raw["output_tokens"] <= sum(most for _, most in PROMPTS)
    assert 0 < raw["time_to_first_token_p50_ns"] <= raw["time_to_first_token_p99_ns"] <= raw["duration_ns"]
    assert 0 < raw["time_between_tokens_p50_ns"] <= raw["time_between_tokens_p99_ns"] <= raw["duration_ns"]
    assert raw["output_tokens_per_second"] == pytest.approx(raw["output_tokens"] * 1e9 / raw["duration_ns"])

    config = resolve(RunConfig, file=folder / "config.toml", environment={}).value
    assert (config.engine.policy, config.engine.kv_memory) == (policy, 4 * MB)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for metric in told["metrics"]:
        assert f"<td class=value>{metric['value']}</td>" in page


@pytest.mark.slow
def test_once_prints_the_table_and_where_the_run_is(armillary: Command, long_context_model: Path, tmp_path: Path) -> None:
    ran = armillary("demo", long_context_model, "--once", "--train-seconds", "0", "--runs", tmp_path)
    assert ran.returncode == 0, ran.stderr
    (folder,) = tmp_path.iterdir()
    for line in ("time to first token, p50", "time between tokens, p99", "answer throughput", "KV cache, peak", "preemptions"):
        assert f"\n{line}" in ran.stdout
    assert f"report  {folder}/report.html" in ran.stdout


def test_a_folder_that_cannot_be_made_is_told_before_anything_runs(armillary: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    ran = armillary("demo", "no-such-model", "--once", "--runs", tmp_path / "file" / "runs")
    assert ran.returncode == 2
    assert "--runs" in ran.stderr
    assert "loading" not in ran.stderr


@pytest.mark.slow
def test_the_small_model_is_trained_in_the_time_given_and_continues_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from armillary.cli.demo_train import train_small
    from armillary.data.prepare import prepare_text
    from armillary.models.load import load

    for index in range(6):
        (tmp_path / f"{index}.txt").write_text("to be or not to be, that is the question. " * (20 + index), encoding="utf-8")
    prepare_text(sorted(tmp_path.glob("*.txt")), tmp_path / "corpus", vocabulary=300)
    session = train_small(tmp_path / "corpus", tmp_path / "runs", seconds=0.1)
    assert session.run.trainer.progress.step == session.run.config.steps == 20  # the fewest
    assert session.evaluations[-1][1].loss < session.evaluations[0][1].loss
    loaded = load(session.folder / "model")
    assert loaded.chat_template is not None
    assert loaded.chat_template.render([{"role": "user", "content": "to be"}]) == "to be"
    assert "report" in capsys.readouterr().out
