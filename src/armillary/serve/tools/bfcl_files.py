"""The benchmark's files: which categories there are and which are scored here, their questions with the accepted answers, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from armillary.core.errors import FormatError, InputError
from armillary.serve.tools.bfcl import Calls, Case, read_output

MAX_FILE_BYTES = 256 * 1024 * 1024
ANSWERS = "possible_answer"  # the folder of accepted answers beside the questions, in files of the same names
_KINDS = ("irrelevance", "relevance", "parallel", "multiple", "simple")
_NOT_SCORED = {
    "javascript": "its values are written in JavaScript",
    "java": "its values are written in Java",
    "multi_turn": "it is scored by what calls of several turns do to programs, which are not run here",
    "memory": "it is scored by an agent's answers, with tools that are not run here",
    "web_search": "it is scored by an agent's answers, with tools that are not run here",
    "format_sensitivity": "it asks other categories' questions in other prompts",
}


def category(questions: Path) -> str:
    """`simple_python` of `BFCL_v4_simple_python.json`."""
    name = questions.stem
    parts = name.split("_")
    return "_".join(parts[2:]) if parts[0].upper() == "BFCL" and len(parts) > 2 else name


def not_scored(name: str) -> str | None:
    """Why a category is not scored here; None for one that is."""
    for mark, why in _NOT_SCORED.items():
        if mark in name.lower():
            return why
    return None if _kind(name) is not None else f"its name has none of {', '.join(_KINDS)}, which are scored by their calls"


def _kind(name: str) -> Any:
    return next((kind for kind in _KINDS if kind in name.lower()), None)


def question_files(place: Path, wanted: Sequence[str] = ()) -> list[Path]:
    """The questions: one file, or a folder's files in order of their names; only the categories `wanted` where some are."""
    files = sorted(place.glob("BFCL_*.json")) if place.is_dir() else [place]
    if not files:
        raise InputError(f"{place} has no file BFCL_*.json", "give the benchmark's data folder, or one of its files")
    for name in wanted:
        if name not in map(category, files):
            raise InputError(f"{place} has no category {name!r}", f"categories: {', '.join(map(category, files))}", field="category")
    return [file for file in files if not wanted or category(file) in wanted]


def answer_file(questions: Path, given: Path | None) -> Path | None:
    """The accepted answers of `questions`: what was given, or the benchmark's own place; None where there are none."""
    if given is not None and not given.is_dir():
        return given
    path = (given if given is not None else questions.parent / ANSWERS) / questions.name
    return path if path.is_file() else None


def read_cases(questions: Path, answers: Path | None = None) -> list[Case]:
    """A category's cases, joined by id. Raises InputError for a category that is not scored, and why."""
    name = category(questions)
    why = not_scored(name)
    if why is not None:
        raise InputError(
            f"{name} is not scored: {why}", "give a category whose calls are Python's: simple, multiple, parallel, (ir)relevance"
        )
    kind = _kind(name)
    accepted = {row["id"]: row["ground_truth"] for row in _rows(answers, ("id", "ground_truth"))} if answers is not None else {}
    cases = []
    for row in _rows(questions, ("id", "question", "function")):
        if kind not in ("irrelevance", "relevance") and row["id"] not in accepted:
            raise FormatError(f"no accepted answer for {row['id']!r}", "give the file of possible answers that belongs to the questions")
        if not isinstance(row["question"], list) or len(row["question"]) != 1:
            raise FormatError(f"{questions.name}: {row['id']!r} has not one turn", "only questions of one turn are scored")
        cases.append(Case(row["id"], kind, tuple(row["question"][0]), tuple(row["function"]), tuple(accepted.get(row["id"], ()))))
    return cases


def read_results(path: Path) -> dict[str, Calls | None]:
    """The leaderboard's result files, by id: `result` is text in Python's syntax, or calls as `[{name: arguments as JSON text}]`."""
    return {row["id"]: _result(row["result"]) for row in _rows(path, ("id", "result"))}


def result_row(name: str, calls: Calls | None, text: str) -> dict[str, Any]:
    """A line of such a file."""
    made = [{called: json.dumps(arguments, ensure_ascii=False)} for called, arguments in calls or ()]
    return {"id": name, "result": made or text}


def _result(result: Any) -> Calls | None:
    if isinstance(result, str):
        return read_output(result)
    try:
        calls = [(name, json.loads(text)) for one in result for name, text in one.items()]
    except (AttributeError, TypeError, ValueError, RecursionError):
        return None
    return calls if all(isinstance(arguments, Mapping) for _, arguments in calls) else None


def _rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise FormatError(f"{path.name} has over {MAX_FILE_BYTES:,} bytes", "check that it is the right file")
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path.name}, line {number} is not JSON ({str(error)[:80]})", "give a file of JSON lines") from error
        if not isinstance(row, dict) or any(field not in row for field in fields):
            raise FormatError(f"{path.name}, line {number} lacks one of {', '.join(fields)}", "give a file of the benchmark")
        rows.append(row)
    return rows
