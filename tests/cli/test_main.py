"""The command starts light, names the closest match, and tells what is wrong and what to do in two lines."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import VERBS, Command, environment

from armillary import __version__
from armillary.cli import main
from armillary.core.errors import ArmillaryError, InputError

HEAVY = ("torch", "numpy", "pydantic", "fastapi", "uvicorn", "transformers", "tokenizers", "plotly", "matplotlib", "armillary.serve.engine")


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), ["models", "show"], ["trace", "png"]], ids=" ".join)
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    """`--help` must answer in under half a second: torch alone takes two, pydantic a fifth of one."""
    code = f"import sys; from armillary.cli.main import run; status = run({[*verb, '--help']!r}); print(status, [m for m in {HEAVY!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert ran.stdout.splitlines()[-1] == "0 []"
    assert "Usage: armillary" in ran.stdout
    assert ran.stderr == ""


def test_every_verb_is_listed_and_every_listed_verb_is_there(armillary: Command) -> None:
    listed = armillary("--help").stdout
    for verb in VERBS:
        assert f"  {verb}: " in listed
    assert set(VERBS) == set(main._VERBS)


def test_version(armillary: Command) -> None:
    assert armillary("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        (["serv"], 'Unknown command "serv". Did you mean "serve"?', "armillary --help"),
        (["serve", "--prot", "3"], "Unknown option: --prot. Did you mean --port?", "armillary serve --help"),
        (["serve", "--port", "eighty"], '"eighty"', "armillary serve --help"),
        (["serve", "--port", "99999"], "server.port = 99999 (from flag) is out of bounds", "65535"),
        (["serve", "--policy", "sarati"], "no scheduler policy is called 'sarati'", "sarathi, vllm, orca, request-level"),
        (["serve", "--kv-memory", "lots"], "engine.kv_memory", "2GB or 512 MiB"),
        (["serve", "--config", "absent.toml"], "absent.toml", "check the path"),
        (["serve", "--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines", "ARMILLARY_SERVER__API_KEY"),
        (["serve", "--host", "999.1.1.1", "--api-key", "k"], "999.1.1.1", "--host"),
        (["serve", "smolm2", "--port", "0"], "there is no model 'smolm2'", "did you mean smollm2?"),
        (["chat", "absent.gguf", "-m", "hi"], "there is no model 'absent.gguf'", "smollm2"),
        (["chat"], "there is no message", "-m TEXT"),
        (["models", "pull", "smolm2"], "there is no model named 'smolm2'", "did you mean smollm2?"),
        (["models", "shwo"], "shwo", "armillary models --help"),
        (["trace", "show"], "FILE", "armillary trace show --help"),
        (["trace", "show", "absent.json"], "absent.json", ""),
        (["demo", "--runs"], "--runs", "armillary demo --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_two_lines_and_status_2(armillary: Command, tmp_path: Path, arguments: list[str], problem: str, fix: str) -> None:
    ran = armillary(*arguments)
    assert ran.returncode == main.MISUSED
    first, second = ran.stderr.splitlines()
    assert first.startswith("error: ")
    assert problem in first
    assert second.startswith("  fix: ")
    assert fix in second
    assert ran.stdout == ""


def test_an_error_at_the_python_level_is_a_traceback_only_with_debug(armillary: Command) -> None:
    plain, debug, variable = (
        armillary("models", "pull", "x"),
        armillary("models", "pull", "x", "--debug"),
        armillary("models", "pull", "x", ARMILLARY_DEBUG="1"),
    )
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "Traceback" in variable.stderr


def test_a_variable_that_nearly_names_an_option_is_warned_about_once(armillary: Command) -> None:
    errors = armillary("chat", "nothing", "-m", "x", ARMILLARY_ENGINE__POLCY="orca").stderr.splitlines()
    assert errors[0] == "warning: ARMILLARY_ENGINE__POLCY is set but names no option and is ignored: did you mean ARMILLARY_ENGINE__POLICY?"
    assert [line.split(":")[0] for line in errors] == ["warning", "error", "  fix"]


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def verb(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", SimpleNamespace(meta=verb))
    return main.run(["serve"])


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("the port is taken", "choose another"), main.MISUSED, "error: the port is taken\n  fix: choose another\n"),
        (ArmillaryError("it broke"), main.MISUSED, "error: it broke\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/absent/out.png"),
            main.MISUSED,
            "error: /absent/out.png: No such file or directory\n"
            "  fix: check the path, its permissions and the free space (--debug shows where it arose)\n",
        ),
        (KeyboardInterrupt(), main.INTERRUPTED, "interrupted\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte\nframes"),
            main.MISUSED,
            "error: there is not enough memory (DefaultCPUAllocator: can't allocate memory: 1 byte)\n"
            "  fix: make what is asked for smaller: the model, the batch, the context\n",
        ),
        (
            ZeroDivisionError("by zero"),
            main.MISUSED,
            "error: ZeroDivisionError: by zero\n  fix: this is a defect of Armillary: run again with --debug and report the traceback\n",
        ),
    ],
)
def test_what_goes_wrong_is_told_on_stderr(
    error: BaseException, status: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ARMILLARY_DEBUG", raising=False)
    assert failing(error, monkeypatch) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", told)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m armillary models | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment())
    assert ran.stdout.splitlines()[-1] == "0"
    assert ran.stderr == ""


def test_ctrl_c_during_the_first_imports_leaves_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'cyclopts': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from armillary.__main__ import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "")


def test_help_into_a_pipe_is_wrapped_once_to_the_readers_width(armillary: Command) -> None:
    lines = armillary("serve", "--help", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    starts = [line for line in lines if line.startswith("  --")]
    assert all(line.startswith(("  ", "Usage", "Serve")) or line.endswith(":") for line in lines if line)
    assert len(starts) > 50
