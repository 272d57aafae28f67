"""The command `armillary`: which verb runs, and how whatever goes wrong is told.

Verbs are registered by import path, so `armillary --help` imports none of them, and a verb's own module imports torch, the
models and the engine only inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from armillary import __version__
from armillary.cli.plain_help import WrappedPlain
from armillary.core.errors import ArmillaryError

FAILED = 1  # it ran, and what it checked does not hold
MISUSED = 2  # it could not do what was asked: bad input, missing files, no room
INTERRUPTED = 130  # Ctrl-C, as shells number it
TERMINATED = 143  # SIGTERM, likewise

_VERBS = {
    "serve": "Serve a model over an OpenAI-compatible HTTP API, with a chat page at /.",
    "chat": "Talk to a model in the terminal.",
    "demo": "Serve 16 chats at once with a real model; measure, report, chat.",
    "simulate": "A workload on hardware that is not here, by the same engine in virtual time.",
    "plan": "The cheapest hardware and configuration that keep an objective, as a file for serve.",
    "train": "Pre-train a new model, or fine-tune one, from a TOML file.",
    "batch": "Answer a file of requests (JSON lines) without a server.",
    "doctor": "What this machine offers, and what will be slow on it and why.",
    "cluster": "Devices, links, nodes and racks by name, with the source of every figure.",
    "calibrate": "Measure this machine into a profile file, for cost models.",
    "perplexity": "What a weight format costs in quality, measured on real text.",
    "bfcl": "How well a model calls functions (Berkeley Function Calling Leaderboard).",
    "models": "Models by name: list, published, pull, show, export, cache.",
    "data": "Text into token shards: list, prepare, inspect, dedup, autotune.",
    "trace": "Look into a saved trace: show, png, html.",
    "compare": "What a simulation said beside what happened: two traces of the same requests.",
    "reproduce": "Run a published system's headline experiment; compare with its figure.",
}

app = App(
    name="armillary",
    help="One system for the whole life of a foundation model: a schedule is data.",
    version=__version__,
    help_format="plaintext",
    help_formatter="default" if sys.stdout.isatty() else WrappedPlain(),
    default_parameter=Parameter(show_default=lambda value: str(value) if value not in (None, False, ()) else None),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False  # ours to tell
app["--help"].group = app["--version"].group = "Options"
for _name, _line in _VERBS.items():
    app.command(f"armillary.cli.{_name}:{_name}", name=_name, help=_line)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[
        bool, Parameter(negative=(), group="Options", help="Show the Python traceback of an error (also: ARMILLARY_DEBUG=1).")
    ] = False,
) -> object:
    # A verb that takes any flag (train) keeps this one among its own.
    if debug or "--debug" in tokens:
        os.environ["ARMILLARY_DEBUG"] = "1"
    return app([token for token in tokens if token != "--debug"], exit_on_error=False, print_error=False)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status: 0, or FAILED, MISUSED, INTERRUPTED. Errors are told on stderr."""
    try:
        outcome = app.meta(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) and not isinstance(outcome, bool) else 0
    except CycloptsError as error:
        error.verbose = False
        _tell(" ".join(str(error).split()), _help_of(error))
        return MISUSED
    except ArmillaryError as error:
        if _debugging():
            raise
        _tell(error.problem, error.fix, error.field)
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # paths that the user gave: a full disk, a missing folder, no permission
        if _debugging():
            raise
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"{where}{error.strerror or error}", "check the path, its permissions and the free space (--debug shows where it arose)")
        return MISUSED
    except Exception as error:
        if _debugging():
            raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
            _tell(f"there is not enough memory ({_first_line(error)})", "make what is asked for smaller: the model, the batch, the context")
            return MISUSED
        _tell(
            f"{type(error).__name__}: {error}",
            "this is a defect of Armillary: run again with --debug and report the traceback",
        )
        return MISUSED


def main() -> None:
    """The entry point. SIGTERM unwinds like Ctrl-C, so that engines stop and half-written files go."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        status = run(sys.argv[1:])
    finally:  # whoever sends it twice (timeout does, to the group too) has been heard: raised in the interpreter's last acts it is but noise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if status == INTERRUPTED:  # a second Ctrl-C while the process is leaving would end it by the signal, without this status
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def _terminate(number: int, frame: object) -> None:
    sys.exit(TERMINATED)


def _tell(problem: str, fix: str, field: str | None = None) -> None:
    """Two lines on stderr: what is wrong, and what to do; for a program that has set ARMILLARY_ERRORS=json, one JSON object."""
    if os.environ.get("ARMILLARY_ERRORS") == "json":
        import json

        print(json.dumps({"problem": problem, "fix": fix, "field": field}), file=sys.stderr)
        return
    print(f"error: {problem}", file=sys.stderr)
    if fix:
        print(f"  fix: {fix}", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _help_of(error: CycloptsError) -> str:
    verb = " ".join(error.command_chain or ())
    return f"armillary {verb} --help lists what it takes" if verb else "armillary --help lists the verbs"


def _debugging() -> bool:
    return os.environ.get("ARMILLARY_DEBUG", "") not in ("", "0")


if __name__ == "__main__":
    main()
