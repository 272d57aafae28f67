"""`armillary chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, Json, settle

if TYPE_CHECKING:
    from armillary.serve.request import Event, SamplingParams
    from armillary.serve.service import Service

_COMMANDS = {
    "/exit": "leave (also Ctrl-D)",
    "/system TEXT": "set the instructions that every answer follows; without TEXT, remove them",
    "/clear": "forget the conversation",
    "/help": "this list",
}
_MAX_STDIN_BYTES: Final = 10_000_000
_DEFAULTS: Final[dict[str, Any]] = {"engine.max_running": 1}
"""One conversation: the KV pool need not hold more than one full context."""


def chat(
    model: Annotated[str | None, Parameter(help="A name (smollm2), a .gguf file or a model folder.")] = None,
    /,
    *,
    message: Annotated[
        str | None, Parameter(name=("--message", "-m"), help="One message: answer it and leave. Piped text is added to it.")
    ] = None,
    system: Annotated[str | None, Parameter(help="Instructions that every answer follows.")] = None,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token always.")] = 0.7,
    top_p: Annotated[float, Parameter(help="Draw from the likeliest tokens that hold this share of the probability.")] = 0.95,
    max_tokens: Annotated[int, Parameter(help="Most tokens an answer.")] = 1024,
    sampling_seed: Annotated[int | None, Parameter(help="The same seed draws the same answer.")] = None,
    config: ConfigFile = None,
    json: Json = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008 (frozen)
) -> None:
    """Talk to a model in the terminal; piped text or -m is answered once."""
    from armillary.cli.launch import launch
    from armillary.core.errors import InputError
    from armillary.serve.request import SamplingParams

    settled = settle(model, engine, file=config, defaults=_DEFAULTS)
    if not 0 <= temperature <= 100 or not 0 < top_p <= 1 or max_tokens < 1:
        raise InputError(
            f"temperature {temperature:g}, top_p {top_p:g}, max_tokens {max_tokens} do not fit",
            "use temperature 0 to 100, top_p over 0 up to 1, max_tokens of at least 1",
        )
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=sampling_seed)
    asked = _asked(message)
    if json and asked is None:
        raise InputError("--json is for one message", "give -m TEXT or pipe the text in")
    running = launch(settled)
    talk = Conversation(running.service, sampling, system)
    running.engine.start()
    try:
        if asked is None:
            _converse(talk)
        elif json:
            _print_answer(talk, asked)
        else:
            talk.say(asked, _write)
            print()
            talk.tell_end()
    finally:
        running.engine.stop()


class Conversation:
    """The messages so far; an answer that was stopped or failed leaves what was said, and no half turn."""

    def __init__(self, service: Service, sampling: SamplingParams, system: str | None = None) -> None:
        self.service = service
        self.sampling = sampling
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.last: Event | None = None
        self.tokens = 0

    def say(self, text: str, write: Callable[[str], None]) -> str:
        """Ask, hand the answer out piece by piece, return it whole. Raises InputError when the context is full."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns, {"role": "user", "content": text}]
        prompt = self.service.chat_tokens(messages)
        room = self.service.room(len(prompt), None, "messages")
        sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
        pieces: list[str] = []
        self.tokens, self.last = 0, None
        with contextlib.closing(self.service.stream(messages, sampling, whole_context=False)) as events:
            for event in events:
                self.tokens += event.token is not None
                self.last = event
                pieces.append(event.text)
                write(event.text)
        if self.last is not None and self.last.error is not None:
            raise self.last.error
        answer = "".join(pieces)
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def tell_end(self) -> None:
        """An answer that was cut is never passed off as a whole one."""
        if self.last is not None and self.last.finish_reason == "length":
            print(f"(cut after {self.tokens:,} tokens: --max-tokens or the context allows no more)", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_answer(talk: Conversation, asked: str) -> None:
    from armillary.cli.terminal import print_json

    answer = talk.say(asked, lambda text: None)
    assert talk.last is not None
    print_json({"model": talk.service.model_name, "answer": answer, "tokens": talk.tokens, "finish_reason": talk.last.finish_reason})


def _converse(talk: Conversation) -> None:
    """Read, answer, repeat. Ctrl-C stops an answer, and at the prompt leaves."""
    from armillary.core.errors import ArmillaryError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history in input())
    print("Type a message; /help lists the commands, /exit leaves.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            continue
        if text.startswith("/"):
            if not _command(talk, text):
                return
            continue
        try:
            talk.say(text, _write)
            print()
            talk.tell_end()
        except KeyboardInterrupt:
            print("\n(stopped)")
        except ArmillaryError as error:
            print(f"\nerror: {error.problem}\n  fix: {error.fix or 'try again'}; /clear forgets the conversation")


def _command(talk: Conversation, text: str) -> bool:
    """Carry out a command; False to leave."""
    name, _, rest = text.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/system":
        talk.system = rest.strip() or None
        print("instructions set" if talk.system else "instructions removed")
    elif name == "/clear":
        talk.turns.clear()
        print("forgotten")
    else:
        known = [command.split()[0] for command in _COMMANDS]
        if name != "/help":
            close = difflib.get_close_matches(name, known, n=1)
            print(f"there is no command {name}" + (f"; did you mean {close[0]}?" if close else ""))
        for command, meaning in _COMMANDS.items():
            print(f"  {command:<14} {meaning}")
    return True


def _asked(message: str | None) -> str | None:
    """The one message to answer: -m, what is piped in, or both; None is a conversation. Raises InputError when it is empty."""
    from armillary.core.errors import InputError

    piped = ""
    if _is_piped(sys.stdin):
        content = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
        if len(content) > _MAX_STDIN_BYTES:
            raise InputError(f"more than {_MAX_STDIN_BYTES:,} bytes came in on stdin", "no model's context holds that: send less")
        try:
            piped = content.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"what came in on stdin is not UTF-8 (byte {error.start:,})", "pipe text in") from error
    elif message is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    asked = "\n\n".join(part for part in ((message or "").strip(), piped) if part)
    if not asked:
        raise InputError("there is no message", "give -m TEXT, pipe text in, or run it on a terminal")
    return asked


def _is_piped(stream: object) -> bool:
    """A pipe or a file, which end; not a terminal, a null device or a socket."""
    try:
        mode = os.fstat(stream.fileno()).st_mode  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
