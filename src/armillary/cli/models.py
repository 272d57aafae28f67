"""`armillary models`: models by name, what is here, what one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from armillary.cli.settings import Json

models = App(name="models")


@models.default
@models.command(name="list")
def list_models(*, json: Json = False) -> None:
    """The models that have a name, and which of them are on this machine."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.units import format_bytes
    from armillary.models import hub

    known = [(alias, hub.cached_path(alias), hub.is_cached(alias)) for alias in hub.aliases().values()]
    if json:
        print_json(
            [
                {
                    "name": alias.name,
                    "title": alias.title,
                    "licence": alias.licence,
                    "bytes": alias.bytes,
                    "cached": here,
                    "path": str(path) if here else None,
                }
                for alias, path, here in known
            ]
        )
        return
    table(
        ("name", "model", "licence", "size", "on this machine"),
        [
            (a.name, a.title, a.licence, format_bytes(a.bytes), path if here else f"no: armillary models pull {a.name}")
            for a, path, here in known
        ],
    )
    print("A path to a .gguf file or to a Hugging Face folder works wherever a name does.")


@models.command(name="pull")
def pull(name: Annotated[str, Parameter(help="A name of `armillary models`.")], /) -> None:
    """Fetch a model into the user's cache and check it."""
    from armillary.cli.terminal import byte_progress
    from armillary.models import hub

    with byte_progress(name) as progress:
        path = hub.pull(name, progress=progress)
    print(path)


@models.command(name="export")
def export(
    model: Annotated[str, Parameter(help="A run's folder (its newest checkpoint is taken), or a model by name or path.")],
    path: Annotated[Path, Parameter(help="The folder or .gguf file to make.")],
    /,
    *,
    to: Annotated[Literal["hf", "gguf"], Parameter(help="A Hugging Face folder or a GGUF file.")] = "hf",
    stored: Annotated[str, Parameter(name="--as", help="How matrices are stored: F32, F16, BF16 (hf), Q8_0, Q4_0 (gguf).")] = "F32",
    json: Json = False,
) -> None:
    """Write a model, read it back, and compare its logits with those before."""
    from armillary.cli.terminal import note, print_json
    from armillary.models.load import load
    from armillary.train.export import export as write
    from armillary.train.export import trained_model
    from armillary.train.session import CONFIG

    if (Path(model) / CONFIG).is_file():
        decoder, tokenizer, step = trained_model(Path(model))
        note(f"{model} after {step:,} steps")
    else:
        loaded = load(model)
        decoder, tokenizer = loaded.decoder, loaded.tokenizer
    done = write(decoder, tokenizer, path, to, stored)
    if json:
        print_json({"path": str(done.path), "max_logit_difference": done.difference, "relative": done.relative, "tokens": done.tokens})
        return
    print(
        f"{done.path}: read back, logits of {done.tokens} tokens differ by at most {done.difference:.3g} ({done.relative:.2g} of their spread)"
    )


@models.command(name="cache")
def cache(
    *,
    clear: Annotated[bool, Parameter(negative=(), show_default=False, help="Remove them all; the next start lays out again.")] = False,
    json: Json = False,
) -> None:
    """The laid-out weights that are kept for quick starts."""
    import time

    from armillary.cli.terminal import print_json, table
    from armillary.core.units import format_bytes
    from armillary.serve.executors import kept_files

    if clear:
        freed = kept_files.clear()
        print_json({"freed_bytes": freed}) if json else print(f"removed {format_bytes(freed)}")
        return
    files = [(path, path.stat()) for path in kept_files.kept()]
    if json:
        print_json([{"path": str(path), "bytes": status.st_size, "used": status.st_mtime} for path, status in files])
        return
    day = 86_400
    table(
        ("weights", "size", "last used"),
        [
            (path.name, format_bytes(status.st_size), f"{max(0.0, time.time() - status.st_mtime) / day:.1f} days ago")
            for path, status in files
        ],
    )
    print(f"In {kept_files.folder()}. `armillary models cache --clear` removes them; they are made again when needed.")


@models.command(name="published")
def published(*, json: Json = False) -> None:
    """Architectures that are known without their weights: for `show --batch`, the simulator and the planners."""
    from armillary.cli.model_operations import print_published

    print_published(json)


@models.command(name="show")
def show(
    model: Annotated[
        str, Parameter(help="A name, a .gguf file, a model folder, or a published architecture (`armillary models published`).")
    ],
    /,
    *,
    batch: Annotated[
        str | None,
        Parameter(
            help="List the operations of a batch instead: [COUNTx]TOKENS[@CACHED],..., such as 512,64x1@1000: a prompt and 64 decodes."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        Parameter(
            help="How it is spread over devices: tp, pp, ep, dp, sp (tokens split between), ba (cache split by sequences), as in tp=8,pp=2,sp."
        ),
    ] = None,
    weights: Annotated[
        str | None, Parameter(help="Format of the matrices: fp32, fp16 (default), bf16, fp8, int8, q8_0, int4 or fp4.")
    ] = None,
    activations: Annotated[str | None, Parameter(help="Format between operations (default fp16).")] = None,
    kv: Annotated[str | None, Parameter(help="Format of the KV cache (default fp16).")] = None,
    json: Json = False,
) -> None:
    """What a model is: shape, parameters, stored types, tokenizer, template, the memory it takes; or what it does for a batch."""
    from armillary.cli.terminal import byte_progress, print_json, table
    from armillary.models.graph.published import published

    if batch is not None or model.lower() in published() or any((layout, weights, activations, kv)):
        from armillary.cli.model_operations import print_operations

        print_operations(model, batch, layout, (weights or "fp16", activations or "fp16", kv or "fp16"), json)
        return
    with byte_progress(model) as progress:
        facts = _facts(model, progress)
    if json:
        print_json(facts)
        return
    print(facts["description"])
    table(("", ""), [(name.replace("_", " "), _words(name, value)) for name, value in facts.items() if name != "description"])


def _facts(model: str, progress: Any) -> dict[str, Any]:
    from armillary.models import hub
    from armillary.models.encoder_config import is_encoder
    from armillary.models.load import load

    if is_encoder(path := hub.resolve(model, progress=progress)):
        return _encoder_facts(model, path)
    loaded = load(model)
    config, tokenizer, template = loaded.config, loaded.tokenizer, loaded.chat_template
    windows = sum(config.window(layer) is not None for layer in range(config.num_layers))
    return {
        "description": loaded.description,
        "path": str(loaded.source_path),
        "architecture": config.architecture,
        "parameters": config.parameters(),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_heads} query, {config.num_kv_heads} key/value, {config.head_dim} wide",
        "vocabulary": config.vocab_size,
        "context": config.max_context,
        "rope": f"theta {config.rope.theta:,.0f}, {config.rope.kind}"
        + (f", factor {config.rope.factor:g}" if config.rope.factor != 1 else ""),
        "layers_with_sliding_window": windows,
        "tied_embeddings": config.tie_embeddings,
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, stops at {', '.join(repr(tokenizer.token_text(i)) for i in sorted(tokenizer.stop_ids))}",
        "chat_template": f"{len(template.source):,} characters" if template is not None else None,
        "weight_bytes": config.parameters() * loaded.dtype.itemsize,
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes_per_full_context": config.kv_bytes_per_token() * config.max_context,
    }


def _encoder_facts(model: str, path: Path) -> dict[str, Any]:
    from armillary.models.encoder import load_encoder

    loaded = load_encoder(model)
    config = loaded.config
    return {
        "description": loaded.description,
        "path": str(path),
        "architecture": "bert",
        "parameters": config.parameters(),
        "layers": config.num_layers,
        "dimensions": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_heads}, {config.head_dim} wide",
        "vocabulary": config.vocab_size,
        "context": config.max_tokens,
        "positions": config.positions,
        "pooling": f"{config.pooling}, {'normalised' if config.normalize else 'not normalised'}",
        "weight_bytes": 4 * config.parameters(),
    }


def _words(name: str, value: Any) -> str:
    from armillary.core.units import format_bytes

    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in name:
        return format_bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
