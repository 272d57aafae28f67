"""`armillary perplexity`: what a weight format costs in quality, measured on real text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import EngineFlags, Json, settle

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer
    from armillary.serve.perplexity import Scores

_MAX_FILE_BYTES = 64 << 20


def perplexity(
    model: Annotated[str, Parameter(help="A name (smollm2), a .gguf file or a model folder.")] = "smollm2",
    /,
    *,
    quantize: Annotated[str, Parameter(help="Weight formats to compare with fp32, separated by commas.")] = "fp16,int8,int4",
    kv_dtype: Annotated[str, Parameter(help="Keys and values of the formats compared: one or more, separated by commas.")] = "fp32",
    corpus: Annotated[str, Parameter(help="A text file, or a corpus by its name, whose last documents are taken first.")] = "sotu",
    tokens: Annotated[int, Parameter(help="How much of the text: rounded down to whole windows.")] = 32_768,
    context: Annotated[int, Parameter(help="Tokens of a window; each is computed from an empty cache.")] = 1024,
    deterministic: Annotated[
        bool, Parameter(negative=(), help="Compute every token as an answer is computed: int4 multiplies prompts otherwise.")
    ] = False,
    threads: Annotated[int | None, Parameter(show_default=False, help="Threads that compute (default: one a core).")] = None,
    json: Json = False,
) -> None:
    """Perplexity of a model in each weight format beside fp32: every token of a window but the first is scored."""
    from armillary.cli.terminal import byte_progress, print_json, table
    from armillary.core.errors import InputError
    from armillary.core.units import format_bytes
    from armillary.models import hub
    from armillary.models.config_file import read_config
    from armillary.serve.kv_pool import available_memory
    from armillary.serve.kv_pool import settle as pool_for

    if context > tokens:
        raise InputError(f"{tokens:,} tokens are less than one window of {context:,}", "give more --tokens or a smaller --context")
    asked = [(weights.strip(), kv.strip()) for weights in quantize.split(",") for kv in kv_dtype.split(",")]
    configs = [  # checked before anything is loaded; the first is what the others are compared with
        settle(
            model, EngineFlags(quantize=weights, kv_dtype=kv, context=context, deterministic=deterministic or None, threads=threads)
        ).value.engine
        for weights, kv in dict.fromkeys([("none", "fp32"), *asked])
    ]
    with byte_progress(corpus) as progress:
        text = _documents(corpus, progress)
    with byte_progress(model) as progress:
        described = read_config(hub.resolve(model, progress=progress))
    configs = [
        pool_for(
            config.model_copy(update={"kv_blocks": -(-context // config.block_size), "kv_memory": None}), described, available_memory()
        )
        for config in configs
    ]
    measured, windows, cut_short = _measure(model, text, configs, tokens, context)
    base = measured[0][2]
    if json:
        print_json(
            {
                "model": model,
                "corpus": corpus,
                "context": context,
                "deterministic": deterministic,
                "windows": windows,
                "rows": [_facts(config, size, scores, base) for config, size, scores in measured],
            }
        )
        return
    rows = []
    for config, size, scores in measured:
        over, error = scores.excess(base)
        itself = scores is base
        rows.append(
            (
                _name(config),
                format_bytes(size),
                f"{scores.perplexity:.3f}" + (f" ± {scores.error:.3f}" if scores.error is not None else ""),
                f"{scores.second_half:.3f}",
                "-" if itself else f"{100 * over:+.2f} %" + (f" ± {100 * error:.2f}" if error is not None else ""),
            )
        )
    table(
        ("weights", "bytes", "perplexity", "llama.cpp's way", "over fp32"),
        rows,
        title=f"{model} on {corpus}: {windows} windows of {context:,} tokens",
    )
    print("± is one standard error, windows being the samples; that of the last column is of the paired differences.")
    if cut_short:
        print(f"The text is shorter than the {tokens:,} tokens that were asked for.")


def _measure(
    model: str, text: list[Path], configs: list[Any], tokens: int, context: int
) -> tuple[list[tuple[Any, int, Scores]], int, bool]:
    """(config, bytes of weights, scores) of each config, the number of windows, and whether there was less text than asked for."""
    import torch

    from armillary.cli.terminal import timed
    from armillary.models.load import load
    from armillary.serve.llm import build_forward
    from armillary.serve.perplexity import score, windows

    loaded = load(model)
    ids = _tokens(text, loaded.tokenizer, tokens)
    tokenizer = loaded.tokenizer
    cut = windows(ids[:tokens], context, tokenizer.bos if tokenizer.add_bos else None)
    measured = []
    for config in configs:
        threads = config.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        with timed(f"scoring {_name(config)}") as done:
            forward = build_forward(loaded, config, threads)
            measured.append((config, forward.weight_bytes, score(forward, cut, config.block_size)))
            done(f"scored {_name(config)}")
        del forward  # before the next one is laid out
    return measured, len(cut), len(ids) < tokens


def _documents(corpus: str, progress: Any) -> list[Path]:
    """The text files, in the order in which they are read. Raises NotFoundError naming the corpora, or InputError."""
    from armillary.core.errors import InputError
    from armillary.data.corpora import corpus_files

    path = Path(corpus).expanduser()
    if not path.is_file():
        return corpus_files(corpus, progress)[::-1]
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InputError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes", "give a smaller text")
    return [path]


def _tokens(files: list[Path], tokenizer: Tokenizer, count: int) -> list[int]:
    """Tokens of whole documents until there are `count`, or all that there are."""
    from armillary.core.errors import InputError

    ids: list[int] = []
    for path in files:
        try:
            ids += tokenizer.encode(path.read_text(encoding="utf-8"), special=False)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 (byte {error.start:,})", "give plain text") from error
        if len(ids) >= count:
            break
    return ids


def _name(config: Any) -> str:
    weights = "fp32" if config.quantize == "none" else config.quantize
    return weights if config.kv_dtype == "fp32" else f"{weights}, {config.kv_dtype} KV"


def _facts(config: Any, size: int, scores: Scores, base: Scores) -> dict[str, Any]:
    over, error = scores.excess(base)
    return {
        "weights": config.quantize,
        "kv_dtype": config.kv_dtype,
        "weight_bytes": size,
        "perplexity": scores.perplexity,
        "standard_error": scores.error,
        "second_half_perplexity": scores.second_half,
        "over_fp32": over,
        "over_fp32_standard_error": error,
    }
