"""`armillary train` on a corpus of its own making: the folder it leaves, what it prints, Ctrl-C, and bad input."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from armillary.cli.main import run
from armillary.cli.train import settle_training
from armillary.core.trace import Trace
from armillary.data.prepare import prepare_chats, prepare_text
from armillary.models.load import load
from armillary.models.tokenizer import Tokenizer

TINY = """
steps = 6
[architecture]
layers = 2
hidden = 32
heads = 2
[batch]
rows = 4
micro_rows = 2
length = 32
[optimizer]
lr = 1e-2
[evaluate]
batches = 2
every = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A prepared corpus and a configuration."""
    folder = tmp_path_factory.mktemp("train")
    words = ["the sphere turns", "rings within rings", "a schedule is data", "what runs where and when"]
    for index in range(12):
        (folder / f"{index:02}.txt").write_text(" ".join(words[(index * k) % 4] for k in range(1, 40)))
    prepare_text(sorted(folder.glob("*.txt")), folder / "corpus", vocabulary=300, validation=0.2)
    (folder / "tiny.toml").write_text(TINY + f'[data]\nfolder = "{folder / "corpus"}"\n')
    return folder


def start(place, *arguments, **options):
    command = [sys.executable, "-m", "armillary", "train", str(place / "tiny.toml"), "--runs", str(place / "runs"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARMILLARY_NATIVE": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_a_run_leaves_everything_that_it_promises(place):
    process = start(place, "--json", "--optimizer.weight-decay", "0.2")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]
    kinds = [(line["event"], line.get("step")) for line in lines]
    steps = [("step", step) for step in range(1, 7)]
    assert kinds == [("evaluation", 0), *steps[:3], ("evaluation", 3), *steps[3:], ("evaluation", 6), ("end", None)]
    losses = [line["loss"] for line in lines if line["event"] == "evaluation"]
    assert losses[0] > losses[1] > losses[2]
    folder = Path(lines[-1]["run"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.toml",
        "data.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "trace.json",
    ]
    assert json.loads((folder / "data.json").read_text()).keys() == {"train", "validation"}
    assert "weight_decay = 0.2  # flag" in (folder / "config.toml").read_text()
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == lines[:-1]
    spans = Trace.load(folder / "trace.json").spans()
    assert [span.sizes["step"] for span in spans if span.kind == "step"] == list(range(1, 7))
    assert {"data", "forward", "backward", "gradient norm", "clip", "optimizer", "evaluate"} <= {span.kind for span in spans}
    page = (folder / "report.html").read_text()
    for word in ("Pre-training a model of", "held-out perplexity", "What it writes", "weight_decay = 0.2"):
        assert word in page


def test_an_interrupt_ends_after_the_step_and_saves(place):
    process = start(place, "--steps", "100000", "--evaluate.every", "0")
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping after this step, then saving" in errors
    saved = re.search(r"^model +(\S+)", out, re.MULTILINE)[1]
    assert load(saved).config.hidden_size == 32
    assert f"armillary train --resume {Path(saved).parent} goes on" in errors

    done = len((Path(saved).parent / "metrics.jsonl").read_text().splitlines())
    command = [sys.executable, "-m", "armillary", "train", "--resume", str(Path(saved).parent), "--steps", str(done + 2), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ARMILLARY_NATIVE": "0"})
    assert answer.returncode == 0, answer.stderr
    assert run(["models", "export", str(Path(saved).parent), str(place / "out.gguf"), "--to", "gguf"]) == 0
    assert load(place / "out.gguf").config.hidden_size == 32
    steps = [json.loads(line).get("step") for line in answer.stdout.splitlines()]
    assert steps[0] == done  # the first line of its metrics was the evaluation before the first step
    assert load(saved).config.hidden_size == 32


@pytest.mark.slow
def test_fine_tuning_goes_through_the_same_door(place):
    first = start(place, "--json")
    folder = json.loads(first.communicate()[0].splitlines()[-1])["run"]
    rest = (place / "tiny.toml").read_text().replace("[architecture]\nlayers = 2\nhidden = 32\nheads = 2\n", "")
    (place / "tune.toml").write_text(f'model = "{folder}/model"\n' + rest)
    command = [sys.executable, "-m", "armillary", "train", str(place / "tune.toml"), "--runs", str(place / "runs"), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ARMILLARY_NATIVE": "0"})
    assert answer.returncode == 0, answer.stderr
    before = [json.loads(line)["loss"] for line in answer.stdout.splitlines() if '"evaluation"' in line]
    untrained = [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").open()]
    assert before[0] < untrained[0] - 0.5  # it begins where the first run ended
    assert before[-1] < before[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch.micro_rows", "3"], "no multiple of batch.micro_rows = 3"),
        (["--optimizer.lrr", "1"], "did you mean --optimizer.lr?"),
        (["--steps"], "--steps has no value"),
        (["--memory.checkpointing", "budget"], "give a budget in bytes"),
        (["--memory.checkpointing", "budget", "--memory.budget", "1000"], "is below the"),
        (["--resume", "runs"], "--resume takes the configuration of its run"),
        (["--data.folder", "/nowhere"], "/nowhere"),
        (["--batch.length", "64", "--architecture.context", "32"], "beyond the model's context of 32"),
        (["--architecture.heads", "5"], "does not divide into 5 heads"),
    ],
)
def test_bad_input_names_the_key_and_the_fix(place, tmp_path, capsys, arguments, told):
    assert run(["train", str(place / "tiny.toml"), "--runs", str(tmp_path), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing was started, so no folder is left


def test_a_run_that_diverges_names_the_step_and_the_cause(place, tmp_path, capsys):
    wild = ["--steps", "40", "--optimizer.lr", "100", "--optimizer.weight_decay", "10", "--schedule.warmup", "0"]
    assert run(["train", str(place / "tiny.toml"), "--runs", str(tmp_path), *wild]) == 2
    assert re.search(r"error: step \d+: the loss is .*\n  fix: .*lower optimizer.lr", capsys.readouterr().err)


def test_a_dry_run_says_all_and_leaves_nothing(place, tmp_path, capsys):
    assert run(["train", str(place / "tiny.toml"), "--runs", str(tmp_path), "--dry-run"]) == 0
    assert "\nstep: 4 rows of 32 tokens in 2 micro-batches; 6 steps\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_mixture_says_and_saves_the_counts_that_came_out_of_its_shares(place, tmp_path, capsys):
    corpus = place / "corpus"
    mixed = (place / "tiny.toml").read_text().split("[data]")[0] + (
        f'[data]\ntokenizer = "{corpus / "tokenizer"}"\n'
        f'[data.mixture]\none = {{ folder = "{corpus}", weight = 3 }}\ntwo = {{ folder = "{corpus}", weight = 1 }}\n'
    )
    (tmp_path / "mixed.toml").write_text(mixed)
    assert run(["train", str(tmp_path / "mixed.toml"), "--runs", str(tmp_path / "runs"), "--steps", "1"]) == 0
    told = json.loads(next((tmp_path / "runs").glob("*/data.json")).read_text())["train"]
    parts = told["mixture"]
    assert (parts["one"]["passes"], parts["two"]["passes"]) == (1.0, pytest.approx(1 / 3, rel=0.2))
    assert parts["one"]["fingerprint"] == parts["two"]["fingerprint"] != told["fingerprint"]
    assert f"mixture one: {parts['one']['documents']:,} documents an epoch, 1 passes, " in capsys.readouterr().err


def test_conversations_that_rows_would_cut_are_told_of(place, tmp_path, capsys):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    chat = {"messages": [{"role": "user", "content": "what turns?"}, {"role": "assistant", "content": " the sphere turns"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 8))
    tokenizer = Tokenizer.from_json(place / "corpus" / "tokenizer")
    prepare_chats([tmp_path / "chats.jsonl"], tmp_path / "chats", tokenizer=tokenizer, template=template, validation=0.3)
    command = ["train", str(place / "tiny.toml"), "--dry-run", "--data.folder", str(tmp_path / "chats")]
    assert run(command) == 0
    assert "packing: conversations are cut where rows end" in capsys.readouterr().out
    assert run([*command, "--data.packing", "documents"]) == 0
    assert "packing: conversations" not in capsys.readouterr().out


def test_a_dry_run_needs_none_of_the_layouts_ranks_and_says_what_it_does_not_predict(place, capsys):
    assert run(["train", str(place / "tiny.toml"), "--dry-run", "--layout", "dp_shard=4"]) == 0
    told = capsys.readouterr().out
    assert "\nstep: 4 rows of 32 tokens in 1 micro-batches; 6 steps\n" in told
    assert "\nlayout: dp_shard=4, 4 ranks\n" in told
    assert "(what dp_shard=4 saves and adds is not predicted)" in told
    assert run(["train", str(place / "tiny.toml"), "--dry-run", "--layout", "dp_shard=3"]) == 2
    assert "does not divide among 3 data-parallel ranks" in capsys.readouterr().err


def test_a_flag_that_says_none_switches_off_what_is_on_by_default(tmp_path):
    assert settle_training(None, ["--clip-norm", "none"]).value.clip_norm is None
    (tmp_path / "own.toml").write_text("clip_norm = 0.5\n")
    settled = settle_training(tmp_path / "own.toml", ["--clip_norm=none"])
    assert (settled.value.clip_norm, settled.provenance["clip_norm"]) == (None, "flag")


def test_a_disk_that_fills_up_is_told_with_the_run_which_goes_on_with_room(place, capsys):
    before = set(place.glob("runs/*"))
    full = start(place, "--steps", "2", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2))
    _, errors = full.communicate()
    (folder,) = set(place.glob("runs/*")) - before
    assert full.returncode == 2, errors
    assert errors.endswith(
        f"error: {folder} could not be written (File too large)\n  fix: free disk space, then: armillary train --resume {folder}\n"
    )
    with (folder / "metrics.jsonl").open("a") as metrics:  # what no run wrote is left out, not a defect
        metrics.write('{"a": 1}\nnull\n{"step": 1, "event": "step"}\n')
    assert run(["train", "--resume", str(folder)]) == 0
    assert "nothing is left to train: 2 of 2 steps are made" in capsys.readouterr().err
    assert (folder / "report.html").read_text().endswith("</html>\n")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 2]


def test_a_step_that_no_memory_holds_is_refused_before_it_is_made(place, monkeypatch, capsys):
    monkeypatch.setattr("armillary.serve.kv_pool.available_memory", lambda: 100_000)
    assert run(["train", str(place / "tiny.toml"), "--runs", str(place / "none")]) == 2
    assert re.search(
        r"a step would take [\d.]+ [kM]B beside the weights; 100 kB of memory are free\n  fix: lower batch.micro_rows",
        capsys.readouterr().err,
    )
