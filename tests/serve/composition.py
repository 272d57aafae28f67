"""Every two features of the engine together: the tokens are those of one request alone on an engine with nothing switched on.

Run as a program it writes the table of docs/composition.md; `--model smollm2` does the same with the real model.
"""

import argparse
import atexit
import itertools
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from adapters import adapter, write
from models import VOCABULARY, loaded, tiny
from split_world import Split

from armillary.core.clock import VirtualClock
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.fleet import worker
from armillary.serve.grammar import grammar
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
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


def _grammar(requests: list[Request]) -> list[Request]:
    """A regular expression, with a beginning that is forced, for every second request."""
    for request in requests[1::2]:
        request.sampling = replace(request.sampling, ignore_eos=False)  # it ends where its grammar does
        request.constraint = compiled().matcher()
    return requests


def _followed(engine: Engine, requests: list[Request]) -> bool:
    texts = ["".join(map(chr, request.output)) for request in requests if request.constraint is not None]
    return len(texts) > 2 and all(text[:4] == "ABCD"[: len(text)] for text in texts)


@cache
def _folders() -> dict[str, str]:
    """Two adapters of the model, as peft's files."""
    root = Path(tempfile.mkdtemp(prefix="armillary-adapters-"))
    atexit.register(shutil.rmtree, root, True)
    return {name: str(write(root / name, model().config, adapter(model().config, seed))) for seed, name in enumerate(("one", "two"))}


def _adapt(engine: Any, requests: list[Request]) -> None:
    """Two requests with each adapter; choices run with their parent's."""
    key = str if isinstance(engine, Split) else engine.adapters.key  # between processes it is a name
    for request in requests:
        name = ("", "one", "two", "one", "", "two")[int(request.id.partition("/")[0])]
        request.adapter = key(name) if name else ""


def _adapted(engine: Any, requests: list[Request]) -> bool:
    return (
        sum(
            bool(request.adapter) and request.output != [*alone(request.prompt, request.sampling, "", False, ("LoRA",))]
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
    Feature("disaggregation", lambda engine, _: engine.dispatcher.handover.transfers > 0, split=True),  # type: ignore[attr-defined]
    Feature("n > 1", lambda engine, _: engine.stats.forked_tokens > 0, arrange=_choices),
    Feature("StreamingLLM, wide", lambda engine, _: not engine.config.kv.positional, {"kv_policy": "streaming", "kv_window": 200}),
    Feature(
        "Quest, all pages", lambda engine, _: engine.config.kv_policy == "quest", {"kv_policy": "quest", "kv_budget": 256, "block_size": 16}
    ),
    Feature("grammar", _followed, arrange=_grammar),
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
        "one drafter proposes": [("n-gram drafts", "layers' drafts")],
        "memory is reserved, nobody is preempted": [("orca", "preemption"), ("request-level", "preemption")],
        "prompts are not cut": [("orca", "chunking"), ("request-level", "chunking")],
        "a batch is served whole, forks would wait for the next": [("request-level", "n > 1")],
        "its blocks hold no whole beginning to be shared": [("StreamingLLM, wide", "n > 1")],
        "one KV policy is served": [("StreamingLLM, wide", "Quest, all pages")],
        "a draft follows the token that is being drawn": [("async", "n-gram drafts"), ("async", "layers' drafts")],
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
        "whose middle kv_policy streaming takes away": [("layers' drafts", "StreamingLLM, wide")],
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
def model() -> Any:
    return loaded(tiny(num_layers=4, max_context=256))


@cache
def compiled() -> Any:
    return GrammarCompiler(model().tokenizer, model().config.vocab_size).compile(grammar.regex("ABCD[A-F]{1,40}"))


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
    options["kv_blocks"] = options.pop("kv_tokens") // options["block_size"]

    # Drafts are as long as measured times say that they pay: here all pay.
    def build() -> Engine:
        return build_engine(model(), EngineConfig(**options), keep_weights=True, clock=VirtualClock())

    return Split(build, worker.grammars(model())) if not plain and any(feature.split for feature in features) else build()


@cache
def alone(prompt: tuple[int, ...], sampling: SamplingParams, lora: str, structured: bool, numerics: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens of one request by itself, with nothing on but what changes the numbers."""
    engine = engine_with(tuple(BY_NAME[name] for name in numerics), plain=True)
    key = engine.adapters.key(lora) if lora else ""
    request = Request("alone", prompt, sampling, adapter=key, constraint=compiled().matcher() if structured else None)
    engine.submit(request)
    engine.run_until_idle()
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
        wanted = alone(request.prompt, request.sampling, request.adapter.partition("#")[0], request.constraint is not None, numerics)
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


def table() -> str:
    """docs/composition.md."""
    notes = list(dict.fromkeys((*NEVER.values(), *REFUSED.values())))
    head = ["", *(str(place + 1) for place in range(len(FEATURES)))]
    lines = [
        "# What works with what",
        "",
        "Every feature of the serving engine beside every other, on a small random model: six requests, greedy and seeded, three of which begin alike, half",
        "of them arriving while the others are served. `=`: all tokens are those of each request alone on an engine with nothing switched on, and",
        "both features had an effect. A letter: they do not meet, and why. **Bold**: asking for both is an error that says so before anything is loaded.",
        "`tests/serve/test_composition.py` runs every cell, and as many features at once as go together;",
        "`python tests/serve/composition.py --model smollm2` does it with the real model; `python tests/serve/composition.py` writes this page.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row, feature in enumerate(FEATURES):
        cells = [f"{row + 1} {feature.name}"]
        for column, other in enumerate(FEATURES):
            pair = names((feature, other))
            letter = chr(97 + notes.index(NEVER.get(pair) or REFUSED[pair])) if pair in NEVER or pair in REFUSED else "="
            cells.append("" if column > row else "·" if column == row else f"**{letter}**" if pair in REFUSED else letter)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {chr(97 + place)}: {note}" for place, note in enumerate(notes))]
    lines += ["", f"At once: {', '.join(feature.name for feature in together())}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="check every pair with this model instead of writing the table")
    options = parser.parse_args()
    if options.model is None:
        PAGE.write_text(table())
        return 0
    from armillary.models.load import load

    served = load(options.model)
    served.decoder  # noqa: B018 (the weights are needed again and again)
    globals()["model"] = lambda: served
    wrong = 0
    for pair in pairs():
        try:
            check(*pair)
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
    print(f"{len(pairs()) - wrong} of {len(pairs())} pairs: tokens equal, both had an effect")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
