"""The demo's second half: a small model, pre-trained on Shakespeare for a given time, to be served beside the first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.train.session import Session

CORPUS: Final = "shakespeare"
VOCABULARY: Final = 1024
TRIAL_STEPS: Final = 4
FEWEST_STEPS: Final = 20

RECIPE: Final[dict[str, Any]] = {
    # A million parameters: in two minutes on two cores they see about a million tokens, once each.
    "architecture": {"layers": 4, "hidden": 128, "heads": 4},
    "batch": {"rows": 8, "micro_rows": 8, "length": 256},
    "optimizer": {"name": "muon", "lr": 5e-3},
    "schedule": {"name": "wsd"},
    "evaluate": {"batches": 8},
}

CONTINUE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template for a model that knows no chat: it goes on where the text ends."""


def prepare() -> Path:
    """The corpus as token shards in the user's cache, fetched and made at first use."""
    from armillary.cli.terminal import byte_progress, timed
    from armillary.core.paths import cache_dir
    from armillary.data.corpora import corpus_files
    from armillary.data.prepare import prepare_text

    folder = cache_dir() / "data" / f"{CORPUS}-{VOCABULARY}"
    if not folder.exists():
        with byte_progress(CORPUS) as progress:
            files = corpus_files(CORPUS, progress)
        with timed(f"learning a vocabulary of {VOCABULARY:,} and tokenizing"):
            prepare_text(files, folder, vocabulary=VOCABULARY, name=CORPUS)
    return folder


def train_small(corpus: Path, runs: Path, seconds: float) -> Session:
    """Pre-train the recipe's model for about `seconds` in a new folder under `runs`, report, and give the finished session.

    The model in the folder continues text, on the chat page too.
    """
    from armillary.cli.train import train_session
    from armillary.cli.train_summary import finish
    from armillary.train.session import MODEL

    resolved = settle(corpus, seconds)
    session = train_session(resolved, runs)
    (session.folder / MODEL / "chat_template.jinja").write_text(CONTINUE, encoding="utf-8")
    finish(session)
    return session


def settle(corpus: Path, seconds: float) -> Resolved[Any]:
    """The recipe with as many steps as fit into `seconds`, by the time that a few trial steps take here."""
    from armillary.cli.terminal import timed
    from armillary.core.config import Resolved, resolve
    from armillary.core.units import S
    from armillary.train.build import build
    from armillary.train.config import TrainConfig

    def of(steps: int) -> Resolved[TrainConfig]:
        settled = resolve(TrainConfig, environment={}, flags={**RECIPE, "data.folder": str(corpus), "steps": steps})
        return Resolved(settled.value, {key: "demo" if told == "flag" else told for key, told in settled.provenance.items()})

    with timed("timing a few trial steps") as done:
        trial = build(of(FEWEST_STEPS).value).trainer
        shortest = min(trial.step(next(trial.batches)).duration for _ in range(TRIAL_STEPS)) / S
        steps = max(FEWEST_STEPS, round(seconds / shortest))
        done(f"{steps:,} steps fit into {seconds:g} s here")
    return of(steps)
