"""The house rules that no single ring can hold: the map tells the truth, the README's commands exist, the CLI starts light."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "armillary"


def packages() -> set[str]:
    """Every package of the tree below the root one, by dotted name."""
    found = {init.parent for init in SOURCE.rglob("__init__.py")} - {SOURCE}
    return {".".join(("armillary", *folder.relative_to(SOURCE).parts)) for folder in found}


def test_map_has_exactly_one_line_a_package() -> None:
    lines = (ROOT / "docs" / "map.md").read_text().splitlines()
    named = [match[1] for line in lines if (match := re.match(r"\| `(armillary[\w.]+)` \| \S.*\|$", line))]
    assert len(named) == len(set(named)), f"docs/map.md names a package twice: {sorted(n for n in named if named.count(n) > 1)}"
    assert set(named) == packages(), (
        f"docs/map.md lacks {sorted(packages() - set(named))} and names what is gone {sorted(set(named) - packages())}: one line a package"
    )


def test_the_contract_of_the_rings_lists_every_ring() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    listed = [ring.strip() for layer in layers for ring in re.split(r"[|:]", layer)]
    assert sorted(listed) == sorted(name for name in packages() if name.count(".") == 1)


def test_every_public_module_says_what_it_is() -> None:
    modules = [path for path in SOURCE.rglob("*.py") if path.name == "__init__.py" or not path.name.startswith("_")]
    silent = [str(path.relative_to(ROOT)) for path in modules if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == [], "these modules have no docstring"


def test_no_large_file_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing is tracked")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    large = [name for name in listing.split("\0") if name and (ROOT / name).is_file() and (ROOT / name).stat().st_size > 1_000_000]
    assert large == [], "weights and data belong in the user cache, pictures under 1 MB"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def quoted_commands(document: str) -> list[str]:
    """The lines of a document's shell blocks, without prompts and comments."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_quoted_make_targets_exist(document: str) -> None:
    quoted = {command.split()[1] for command in quoted_commands(document) if command.startswith("make ")}
    assert quoted, f"{document} quotes no make command"
    assert quoted <= make_targets(), f"{document} quotes targets that the Makefile lacks"


def armillary(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "armillary", *arguments)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_quoted_verbs_exist(document: str) -> None:
    words = [re.sub(r"^\S*/", "", command).split() for command in quoted_commands(document)]
    for verb in sorted({command[1] for command in words if command[0] == "armillary"}):
        answer = armillary(verb, "--help")
        assert answer.returncode == 0, f"{document} quotes `armillary {verb}`: {answer.stderr}"
        assert answer.stdout.startswith(f"Usage: armillary {verb}"), f"{document} quotes `armillary {verb}`, which the command lacks"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, armillary.cli.main as cli; cli.run(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = set(run_python("-c", code).stderr.split())
    assert "armillary.cli.main" in loaded
    assert loaded & {"torch", "numpy", "fastapi", "pydantic", "tokenizers", "matplotlib", "armillary.serve.llm"} == set()


def examples() -> list[object]:
    """The README's Python blocks, each with the output that is quoted below it."""
    found = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [pytest.param(code, output, marks=[pytest.mark.slow] if "smollm2" in code else []) for code, output in found]


def test_every_python_example_of_the_readme_quotes_its_output() -> None:
    assert len(examples()) == len(re.findall(r"^```python", (ROOT / "README.md").read_text(), re.MULTILINE)) > 0


@pytest.mark.parametrize(("code", "output"), examples())
def test_the_readmes_examples_print_what_they_say(code: str, output: str) -> None:
    answer = run_python("-c", code)
    assert (answer.stdout, answer.returncode) == (output, 0), answer.stderr
