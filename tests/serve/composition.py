"""Every two features of the engine together: the tokens are those of one request alone on an engine with nothing switched on.

Run as a program it writes the table of docs/composition.md; with `--model smollm2` it checks every pair with the real model first (ten minutes
of one core), and keeps what was equal, and at which commit, in bench/results/composition.json.
"""

import argparse
import atexit
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from adapters import adapter, write
from http_world import byte_tokenizer
from models import VOCABULARY, tiny
from split_world import Split

from armillary.core.clock import VirtualClock
from armillary.models.hf import save_hf
from armillary.models.load import load
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.fleet import worker
from armillary.serve.grammar import grammar
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.grammar.grammar import Grammar
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.tools import formats
from armillary.serve.tools.constraint import constraint
from armillary.serve.tools.definitions import Tool, Toolbox
from armillary.serve.tools.stream import read_answer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "composition.md"
REAL = ROOT / "bench" / "results" / "composition.json"
TOKENS = 14
BLOCK = 4


@dataclass(frozen=True)
class Feature:
    """`options` switch it on. `numerics` change what a model computes, so the plain engine has them too.

    `arrange` gives requests what it needs; `during` is called before each iteration; `works` tells from the engine and its requests
    that it has had an effect: a pair of which one did nothing proves nothing.
    """

    name: str
    works: Callable[[Engine, list[Request]], bool]
    options: dict[str, Any] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[list[Request]], list[Request]] = lambda requests: requests
    begin: Callable[[Any, list[Request]], None] = lambda engine, requests: None
    during: Callable[[Engine, list[Request]], None] = lambda engine, requests: None
    split: bool = False  # prompts are computed by one engine, answers by another


def _choices(requests: list[Request]) -> list[Request]:
    """Two choices more of every second request, each with a seed of its own."""
    made: list[Request] = []
    for place, request in enumerate(requests):
        made.append(request)
        for choice in range(2 if place % 2 else 0):
            sampling = SamplingParams(TOKENS, temperature=1.0, seed=100 + choice, ignore_eos=True)
            made.append(Request(f"{request.id}/{choice}", request.prompt, sampling, parent=request, adapter=request.adapter))
    return made


LETTERS = grammar.regex("ABCD[A-F]{1,40}")
CALLS = formats.get("pythonic")
TOOLBOX = Toolbox(
    (Tool("f", parameters={"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}, "required": ["n"]}),),
    choice="required",
    parallel=False,
)


@cache
def _compiled(asked: Grammar) -> Any:
    return GrammarCompiler(model().tokenizer, model().config.vocab_size).compile(asked)


def _constrained(requests: list[Request], asked: Grammar) -> None:
    for request in requests:
        request.sampling = replace(request.sampling, ignore_eos=False)  # it ends where its grammar does
        request.constraint = _compiled(asked).matcher()


def _grammar(requests: list[Request]) -> list[Request]:
    """A regular expression, with a beginning that is forced, for every second request."""
    _constrained(requests[1::2], LETTERS)
    return requests


def _tools(requests: list[Request]) -> list[Request]:
    """Two requests that have to call `f(n=...)`."""
    asked = constraint(TOOLBOX, CALLS)
    assert asked is not None
    _constrained(requests[:4:2], asked)
    return requests


def _texts(requests: list[Request], kind: str) -> list[str]:
    """What was answered under the grammars of this kind."""
    asked = [request for request in requests if request.constraint is not None and request.constraint.grammar.kind == kind]
    return [model().tokenizer.decode(request.output) for request in asked]


def _begin(texts: list[str], first: str) -> bool:
    """With what their grammar forces, as far as they came."""
    return all(text[: len(first)] == first[: len(text)] for text in texts)


def _followed(engine: Engine, requests: list[Request]) -> bool:
    texts = _texts(requests, "regex")
    return len(texts) > 2 and _begin(texts, "ABCD")


def _called(engine: Engine, requests: list[Request]) -> bool:
    texts = _texts(requests, "structural_tag")
    calls = [call for text in texts for call in read_answer(text, CALLS, TOOLBOX)[1]]
    arguments = {call.arguments for call in calls if call.name == "f"}
    return len(texts) == 2 and _begin(texts, "[f(n=") and bool(arguments) and arguments <= {f'{{"n": {n}}}' for n in (1, 2, 3)}


@cache
def _folders() -> dict[str, str]:
    """Two adapters of the model, as peft's files."""
    return {name: str(write(_root() / name, model().config, adapter(model().config, seed))) for seed, name in enumerate(("one", "two"))}


def _adapt(engine: Any, requests: list[Request]) -> None:
    """Two requests with each adapter; choices run with their parent's."""
    key = str if isinstance(engine, Split) else engine.adapters.key  # between processes it is a name
    for request in requests:
        name = ("", "one", "two", "one", "", "two")[int(request.id.partition("/")[0])]
        request.adapter = key(name) if name else ""


def _adapted(engine: Any, requests: list[Request]) -> bool:
    return (
        sum(
            bool(request.adapter) and request.output != [*alone(request.prompt, request.sampling, "", None, ("LoRA",))]
            for request in requests
        )
        > 1
    )


def _moved(engine: Any, requests: list[Request]) -> bool:
    engines = engine.engines if isinstance(engine, Split) else [engine]
    return all(one.executor.forward.moved.total() > 0 for one in engines)


def _abort(engine: Engine, requests: list[Request]) -> None:
    for request in requests[::3]:
        if len(request.output) >= 3 and request.finish_reason is None:
            engine.cancel(request.id)


def _told(word: str) -> Callable[[Engine, list[Request]], bool]:
    return lambda engine, requests: any(word in line for request in requests for line in engine.explain(request.id) or ())


def _drafted(engine: Engine, requests: list[Request]) -> bool:
    return engine.stats.drafted_tokens > 0


FEATURES = (
    Feature("vllm", lambda engine, _: engine.policy.name == "vllm", {"policy": "vllm"}),
    Feature("orca", lambda engine, _: engine.policy.name == "orca", {"policy": "orca"}),
    Feature("request-level", lambda engine, _: engine.policy.name == "request-level", {"policy": "request-level"}),
    Feature("shortest job first", lambda engine, _: engine.config.order == "sjf", {"order": "sjf"}),
    Feature("victim by cost", lambda engine, _: engine.config.victim == "cost", {"victim": "cost"}),
    Feature("prefix hit", lambda engine, _: engine.stats.reused_tokens > 0, {"prefix_cache": "on"}),
    Feature("chunking", _told("(chunk)"), {"max_batch_tokens": 7}),
    Feature("preemption", lambda engine, _: engine.stats.preemptions > 0, {"kv_tokens": 72}),
    Feature("n-gram drafts", _drafted, {"speculate": "ngram", "draft_tokens": 3}),
    Feature("layers' drafts", _drafted, {"speculate": "layers", "draft_layers": 0.5, "draft_tokens": 3}),
    Feature("draft model", _drafted, {"speculate": "model", "draft_model": "a path", "draft_tokens": 3}),
    Feature("disaggregation", lambda engine, _: engine.dispatcher.handover.transfers > 0, split=True),  # type: ignore[attr-defined]
    Feature("n > 1", lambda engine, _: engine.stats.forked_tokens > 0, arrange=_choices),
    Feature("StreamingLLM, wide", lambda engine, _: not engine.config.kv.positional, {"kv_policy": "streaming", "kv_window": 200}),
    Feature(
        "Quest, all pages", lambda engine, _: engine.config.kv_policy == "quest", {"kv_policy": "quest", "kv_budget": 256, "block_size": 16}
    ),
    Feature("grammar", _followed, arrange=_grammar),
    Feature("tool calls", _called, arrange=_tools),
    Feature(
        "offload",
        _moved,
        {"offload": "weights=20/40/40,cache=0/50/50,hidden=0/100/0,batches=2"},
        {"backend": "torch"},
    ),
    Feature("LoRA", _adapted, numerics={"lora": "two adapters"}, begin=_adapt),
    Feature("abort", lambda _, requests: any(request.finish_reason == "cancelled" for request in requests), during=_abort),
    Feature("async", lambda engine, _: engine.stats.foreseen_schedules > 0, {"async_scheduling": "on"}),
    Feature("int4", lambda engine, _: engine.config.quantize == "int4", numerics={"quantize": "int4", "deterministic": True}),
)
BY_NAME = {feature.name: feature for feature in FEATURES}
NEVER = {  # pairs of which one rules the other out, and why
    frozenset(pair): why
    for why, pairs in {
        "one policy serves": list(itertools.combinations(("vllm", "orca", "request-level"), 2)),
        "one drafter proposes": list(itertools.combinations(("n-gram drafts", "layers' drafts", "draft model"), 2)),
        "memory is reserved, nobody is preempted": [("orca", "preemption"), ("request-level", "preemption")],
        "prompts are not cut": [("orca", "chunking"), ("request-level", "chunking")],
        "a batch is served whole, forks would wait for the next": [("request-level", "n > 1")],
        "its blocks hold no whole beginning to be shared": [("StreamingLLM, wide", "n > 1")],
        "one KV policy is served": [("StreamingLLM, wide", "Quest, all pages")],
        "a draft follows the token that is being drawn": [
            ("async", "n-gram drafts"),
            ("async", "layers' drafts"),
            ("async", "draft model"),
        ],
    }.items()
    for pair in pairs
}
REFUSED = {  # pairs that are an error before anything is loaded, in these words
    frozenset(pair): words
    for words, pairs in {
        "reserves memory and never preempts, so it has no victims to choose": [
            ("orca", "victim by cost"),
            ("request-level", "victim by cost"),
        ],
        "computes a prompt in one iteration, and kv_policy streaming holds no more than max_batch_tokens of it": [
            ("orca", "StreamingLLM, wide"),
            ("request-level", "StreamingLLM, wide"),
        ],
        "gives back blocks of the middle of a sequence, and the prefix cache keeps whole beginnings": [
            ("prefix hit", "StreamingLLM, wide")
        ],
        "whose middle kv_policy streaming takes away": [("layers' drafts", "StreamingLLM, wide"), ("draft model", "StreamingLLM, wide")],
        "keeps or marks parts of a sequence, and prefill workers hand over plain keys and values": [
            ("StreamingLLM, wide", "disaggregation"),
            ("Quest, all pages", "disaggregation"),
        ],
        "would load the weights of every drafted token": [("layers' drafts", "offload")],
        "offload moves whole sequences": [("StreamingLLM, wide", "offload")],
        "has no kernels in the torch backend": [("Quest, all pages", "offload")],
        "needs the native backend, but the torch backend was asked for": [("offload", "int4")],
    }.items()
    for pair in pairs
}


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="armillary-composition-"))
    atexit.register(shutil.rmtree, root, True)
    return root


def _written(name: str, noise: float) -> Path:
    """A folder with a tiny random model whose tokens are bytes; `noise` makes it another one that mostly agrees."""
    decoder = tiny(num_layers=4, max_context=256, vocab_size=258)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += noise * torch.randn_like(parameter)
    (folder := _root() / name).mkdir()
    byte_tokenizer(folder)
    save_hf(decoder, folder)
    return folder


@cache
def model() -> Any:
    served = load(_written("model", 0.0))
    served.decoder  # noqa: B018 (the weights are needed again and again)
    return served


@cache
def draft() -> str:
    """By what name the draft model is asked for."""
    return str(_written("draft", 0.02))


def workload() -> list[Request]:
    """Six prompts, three of which begin alike; greedy and sampled."""
    rng = random.Random(11)
    stem = [rng.randrange(VOCABULARY - 1) for _ in range(21)]
    prompts = [
        [*(stem if place % 2 else ()), *(rng.randrange(VOCABULARY - 1) for _ in range(length))]
        for place, length in enumerate((9, 3, 24, 6, 1, 12))
    ]
    sampling = [SamplingParams(TOKENS, temperature=0.7 * (place % 3 == 2), seed=place, ignore_eos=True) for place in range(6)]
    sampling[4] = replace(sampling[4], logit_bias=((5, 100.0), (6, 100.0)), temperature=1.0)  # an answer that repeats itself
    return [Request(str(place), tuple(prompt), params) for place, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))]


def plain_options(features: tuple[Feature, ...]) -> dict[str, Any]:
    numerics = {name: value for feature in features for name, value in feature.numerics.items()}
    return {"block_size": BLOCK, "kv_tokens": 480, "max_batch_tokens": 64, "prefix_cache": "off", "seed": 0, "threads": 1, **numerics}


def engine_with(features: tuple[Feature, ...], *, plain: bool = False) -> Engine:
    options = plain_options(features)
    for feature in () if plain else features:
        options |= feature.options
    if "lora" in options:
        options["lora"] = _folders()
    if "draft_model" in options:
        options["draft_model"] = draft()
    options["kv_blocks"] = options.pop("kv_tokens") // options["block_size"]

    # Drafts are as long as measured times say that they pay: here all pay.
    def build() -> Engine:
        return build_engine(model(), EngineConfig(**options), keep_weights=True, clock=VirtualClock())

    return Split(build, worker.grammars(model())) if not plain and any(feature.split for feature in features) else build()


@cache
def alone(
    prompt: tuple[int, ...], sampling: SamplingParams, lora: str, asked: Grammar | None, numerics: tuple[str, ...]
) -> tuple[int, ...]:
    """The tokens of one request by itself, with nothing on but what changes the numbers."""
    engine = engine_with(tuple(BY_NAME[name] for name in numerics), plain=True)
    key = engine.adapters.key(lora) if lora else ""
    request = Request("alone", prompt, sampling, adapter=key, constraint=None if asked is None else _compiled(asked).matcher())
    engine.submit(request)
    engine.run_until_idle()
    engine.stop()
    return tuple(request.output)


def check(*features: Feature) -> None:
    """Raises AssertionError when a token differs, or a feature had no effect."""
    engine, requests = engine_with(features), workload()
    for feature in features:
        requests = feature.arrange(requests)
    for feature in features:
        feature.begin(engine, requests)
    half = len(requests) // 2
    for request in requests[:half]:
        engine.submit(request)
    steps = 0
    while engine.step() or steps < 3:
        steps += 1
        if steps == 3:  # the others come while these are being served
            for request in requests[half:]:
                engine.submit(request)
        for feature in features:
            feature.during(engine, requests)
    engine.check()
    assert engine.snapshot()["blocks"]["used"] == 0
    numerics = tuple(feature.name for feature in features if feature.numerics)
    for request in requests:
        asked = None if request.constraint is None else request.constraint.grammar
        wanted = alone(request.prompt, request.sampling, request.adapter.partition("#")[0], asked, numerics)
        if request.finish_reason == "cancelled":
            wanted = wanted[: len(request.output)]
        else:
            assert request.finish_reason in (("length", "stop") if request.constraint is not None else ("length",)), request.id
        assert tuple(request.output) == wanted, f"{' and '.join(feature.name for feature in features)}: request {request.id}"
    for feature in features:
        assert feature.works(engine, requests), f"{' and '.join(f.name for f in features)}: {feature.name} had no effect"
    engine.stop()


def names(pair: tuple[Feature, ...]) -> frozenset[str]:
    return frozenset(feature.name for feature in pair)


def pairs() -> list[tuple[Feature, Feature]]:
    """Those that are served together."""
    return [pair for pair in itertools.combinations(FEATURES, 2) if names(pair) not in NEVER and names(pair) not in REFUSED]


def together() -> tuple[Feature, ...]:
    """As many features at once as have no quarrel with each other, taken from the end of the table."""
    chosen: list[Feature] = []
    for feature in reversed(FEATURES):
        if all(names((feature, other)) not in NEVER and names((feature, other)) not in REFUSED for other in chosen):
            chosen.append(feature)
    return tuple(reversed(chosen))


def publish(name: str, equal: list[tuple[Feature, Feature]], checked: int) -> None:
    """Keeps which of the pairs that were checked were equal with the model of this name, for the page."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    found = {"model": name, "commit": commit, "checked": checked, "equal": [[feature.name for feature in pair] for pair in equal]}
    REAL.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def table() -> str:
    """docs/composition.md."""
    real = json.loads(REAL.read_text())
    also = {frozenset(pair) for pair in real["equal"]}
    notes = list(dict.fromkeys((*NEVER.values(), *REFUSED.values())))
    head = ["", *(str(place + 1) for place in range(len(FEATURES)))]
    lines = [
        "# What works with what",
        "",
        "Every feature of the serving engine beside every other: six requests, greedy and seeded, three of which begin alike, half of them arriving while",
        "the others are served. `=`: all tokens are those of each request alone on an engine with nothing switched on, and both features had an effect,",
        "with a small random model; `≡`: with SmolLM2-135M too. A letter: they do not meet, and why. **Bold**: asking for both is an error that says",
        "so before anything is loaded. `tests/serve/test_composition.py` runs every cell with the small model, and as many features at once as go together;",
        f"with the real one {len(also)} were equal of {real['checked']} that were checked ({len(pairs())} are served), by the engine of commit {real['commit']};",
        f"`python tests/serve/composition.py --model {real['model']}` does all. `python tests/serve/composition.py` writes this page.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row, feature in enumerate(FEATURES):
        cells = [f"{row + 1} {feature.name}"]
        for column, other in enumerate(FEATURES):
            pair = names((feature, other))
            equal = "≡" if pair in also else "="
            letter = chr(97 + notes.index(NEVER.get(pair) or REFUSED[pair])) if pair in NEVER or pair in REFUSED else equal
            cells.append("" if column > row else "·" if column == row else f"**{letter}**" if pair in REFUSED else letter)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {chr(97 + place)}: {note}" for place, note in enumerate(notes))]
    lines += ["", f"At once: {', '.join(feature.name for feature in together())}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="check every pair with this model before writing the table")
    options = parser.parse_args()
    equal = []
    if options.model is not None:
        served = load(options.model)
        served.decoder  # noqa: B018 (the weights are needed again and again)
        globals().update(model=lambda: served, draft=lambda: options.model)
        for pair in pairs():
            try:
                check(*pair)
                equal.append(pair)
            except AssertionError as error:
                print(f"WRONG {error}", flush=True)
        print(f"{len(equal)} of {len(pairs())} pairs: tokens equal, both had an effect")
        publish(options.model, equal, len(pairs()))
    PAGE.write_text(table())
    return int(options.model is not None and len(equal) < len(pairs()))


if __name__ == "__main__":
    sys.exit(main())
