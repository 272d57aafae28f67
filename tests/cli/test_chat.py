"""`armillary chat` answers what `LLM.chat` answers, keeps the conversation, and never passes a cut answer off as a whole one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Command, environment

from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

GREEDY = ("--temperature", "0", "--max-tokens", "12")


def expected(model: Path, messages: list[dict[str, str]]) -> str:
    (answer,) = LLM(model, max_running=1, threads=1).chat(messages, SamplingParams(max_tokens=12, temperature=0))
    return answer.text


def test_one_message_gets_the_models_answer(armillary: Command, tiny_model: Path) -> None:
    told = json.loads(armillary("chat", tiny_model, "-m", "hello", *GREEDY, "--json").stdout)
    answer = expected(tiny_model, [{"role": "user", "content": "hello"}])
    assert told["answer"] == answer
    assert told["tokens"] == 12
    ran = armillary("chat", tiny_model, "-m", "hello", *GREEDY)
    assert ran.stdout == answer + "\n"
    assert "(cut after 12 tokens" in ran.stderr


def test_piped_text_and_message_and_system_make_one_prompt(armillary: Command, tiny_model: Path) -> None:
    ran = armillary("chat", tiny_model, "-m", "sum up", "--system", "be brief", *GREEDY, stdin="a long text\n")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sum up\n\na long text"}]
    assert ran.stdout == expected(tiny_model, messages) + "\n"
    assert (
        armillary("chat", tiny_model, *GREEDY, stdin="hello\n").stdout
        == expected(tiny_model, [{"role": "user", "content": "hello"}]) + "\n"
    )


@pytest.mark.parametrize(
    ("arguments", "stdin", "problem"),
    [
        (["-m", "x" * 3000], None, "the answer needs at least 1"),
        (["-m", ""], None, "there is no message"),
        ([], "  \n", "there is no message"),
        (["-m", "x", "--temperature", "-1"], None, "temperature -1"),
        (["-m", "x", "--max-tokens", "0"], None, "max_tokens 0"),
        (["--context", "4096", "-m", "x"], None, "context 4,096 is more than the 2,048"),
        (["--kv-blocks", "1000000000", "-m", "x"], None, "engine.kv_blocks"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    armillary: Command, tiny_model: Path, arguments: list[str], stdin: str | None, problem: str
) -> None:
    ran = armillary("chat", tiny_model, *arguments, stdin=stdin)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert problem in ran.stderr
    assert "Traceback" not in ran.stderr


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process, self._file = pty.fork()
        if self.process == 0:
            os.execvpe(sys.executable, [sys.executable, "-m", "armillary", *map(str, arguments)], environment(TERM="dumb"))
        self.seen = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """What is printed up to `text`, which must come."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the other end is closed: what it said is all there is
                    self.seen += os.read(self._file, 65536).decode("utf-8", errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def end(self, key: str = "") -> int:
        """Its exit status. `key` is pressed every second until then: one that comes before readline waits is not seen until the next."""
        deadline, pressed = time.monotonic() + 60, 0.0
        while time.monotonic() < deadline:
            if key and time.monotonic() - pressed > 1:
                pressed = time.monotonic()
                with contextlib.suppress(OSError):
                    self.type(key)
            if select.select([self._file], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._file, 65536)
            pid, status = os.waitpid(self.process, os.WNOHANG)
            if pid:
                os.close(self._file)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.process, 9)
        os.waitpid(self.process, 0)
        raise AssertionError("the command did not end")


@pytest.fixture
def terminal(tiny_model: Path) -> Iterator[Terminal]:
    talk = Terminal("chat", tiny_model, "--temperature", "0", "--max-tokens", "4")
    talk.until("/exit leaves.\n> ")
    yield talk
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.kill(talk.process, 9)
        os.waitpid(talk.process, 0)


def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    terminal.type("hello\n")
    assert "(cut after 4 tokens" in terminal.until("> ")
    terminal.type("/sytem x\n")
    assert "did you mean /system?" in terminal.until("> ")
    terminal.type("/system be brief\n")
    assert "instructions set" in terminal.until("> ")
    terminal.type("x" * 3000 + "\n")
    assert "context" in terminal.until("> ")
    terminal.type("/clear\n")
    assert "forgotten" in terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_the_end_of_input_leaves(terminal: Terminal) -> None:
    assert terminal.end(key="\x04") == 0


def test_ctrl_c_at_the_prompt_leaves_with_130(terminal: Terminal) -> None:
    assert terminal.end(key="\x03") == 130
