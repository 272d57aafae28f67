"""What a peft folder asks for, read and checked against the model without its weights and without torch; what is not carried out is refused by name."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from armillary.core.errors import CapacityError, FormatError, InputError, NotFoundError
from armillary.kernels.cpu_library import PARTS
from armillary.models.config import ModelConfig
from armillary.models.fields import Fields, read_json
from armillary.models.file_stamp import FileStamp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK: Final = 512
_NAME: Final = re.compile(r"(?=.{1,200}\Z)[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_PATTERNS, MAX_PATTERN_LENGTH = 512, 2_000
MAX_HEADER_BYTES: Final = 1 << 20  # of the weights' file, beside what names and shapes of the tensors take

# Read and used below, or without meaning for what is computed from the saved weights. Any other key must say nothing.
_USED = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "init_lora_weights",
}  # fmt: skip
_MEANINGLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "runtime_config",
    "qalora_group_size", "ensure_weight_tying", "eva_config",
}  # fmt: skip
_EMPTY: Final[tuple[Any, ...]] = (None, False, "", "none", [], {})
_PLAIN_INIT: Final[tuple[Any, ...]] = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base's weights alone


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Rank and scale of every projection that has an adapter (by its Hugging Face name), and the files that say so.

    `files` are the config and the weights as they were before they were read.
    """

    projections: Mapping[str, tuple[int, float]]
    nbytes: int  # of the weights as fp32
    files: tuple[FileStamp, FileStamp]


def projections(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear layer that may have an adapter: its Hugging Face name and shape [n, k], layer by layer in the order of `PARTS`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    for layer in range(config.num_layers):
        for part, shape in zip(PARTS, shapes, strict=True):
            yield f"model.layers.{layer}.{'self_attn' if part in PARTS[:4] else 'mlp'}.{part}", shape


def read_lora_config(folder: str | Path, config: ModelConfig, max_bytes: int | None = None) -> LoraConfig:
    """What the folder that peft's `save_pretrained` wrote holds for a model of `config` (Hu et al. 2021; rsLoRA: Kalajdzievski 2023).

    Raises NotFoundError without the files, InputError for what is not carried out (DoRA, biases, embeddings, whole modules, ...),
    FormatError for a damaged file, CapacityError when the weights would take more than `max_bytes`.
    """
    folder = Path(folder)
    settings, weights = folder / CONFIG, folder / WEIGHTS
    if not settings.is_file():
        raise NotFoundError(f"{folder} has no {CONFIG}", "give a folder that peft's save_pretrained has written", field="lora")
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder} holds pickled weights only",
                "pickle can run code and is never read: save the adapter as safetensors",
                field="lora",
            )
        raise NotFoundError(f"{folder} has no {WEIGHTS}", "give a folder that peft's save_pretrained has written", field="lora")
    files = FileStamp.of(settings), FileStamp.of(weights)
    wanted = _wanted(read_json(settings, MAX_CONFIG_BYTES), config)
    shapes = dict(projections(config))
    nbytes = 4 * sum(rank * sum(shapes[name]) for name, (rank, _) in wanted.items())
    if max_bytes is not None and nbytes > max_bytes:
        raise CapacityError(
            f"the adapter in {folder} takes {nbytes:,} bytes, the bound is {max_bytes:,}", "serve with a larger --lora-memory"
        )
    if files[1].size > nbytes + MAX_HEADER_BYTES + 1_000 * len(wanted):
        raise FormatError(
            f"{WEIGHTS} has {files[1].size:,} bytes, the adapter that {CONFIG} describes at most {nbytes:,}",
            "config and weights do not belong together: fetch both again",
        )
    return LoraConfig(wanted, nbytes, files)


def check_name(name: str) -> None:
    """Raises InputError for a name that is no adapter's."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:200]!r} is no name for an adapter",
            "take up to 200 letters, digits, '_', '-' and '.', in parts separated by '/' that begin with none of the last two, as team/sql-v2",
            field="lora_name",
        )


def _wanted(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, tuple[int, float]]:
    """Rank and scale of every projection that the config names, in the order of `projections`."""
    fields = Fields(raw, CONFIG, {"r": 8, "lora_alpha": 8})
    if raw.get("peft_type") != "LORA":
        raise fields.fail("peft_type", f"is {str(raw.get('peft_type'))[:40]!r}; only LORA adapters are served")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise fields.fail("task_type", f"is {str(raw['task_type'])[:40]!r}; only CAUSAL_LM adapters are served")
    for key, value in raw.items():
        if key not in _USED | _MEANINGLESS and value not in _EMPTY:
            raise InputError(
                f"{CONFIG}: {key[:80]} is {str(value)[:60]!r}, which is not carried out here",
                "serve plain LoRA (no DoRA, biases, embeddings or whole modules), or merge the adapter into the model",
                field=key,
            )
    init = raw.get("init_lora_weights")
    if init not in _PLAIN_INIT:
        raise InputError(
            f"{CONFIG}: init_lora_weights is {str(init)[:40]!r}, which may have changed the base model's weights",
            "save the adapter converted (path_initial_model_for_weight_conversion), which sets it to true",
            field="init_lora_weights",
        )
    rank, alpha = fields.integer("r", high=MAX_RANK), fields.number("lora_alpha")
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")
    slow = fields.flag("use_rslora")
    wanted: dict[str, tuple[int, float]] = {}
    for name in _targets(fields, config):
        own_rank, own_alpha = _first(ranks, name, rank), _first(alphas, name, alpha)
        if isinstance(own_rank, bool) or not isinstance(own_rank, int) or not 1 <= own_rank <= MAX_RANK:
            raise fields.fail("rank_pattern", f"gives {name} the rank {str(own_rank)[:40]!r}, not an integer in 1 .. {MAX_RANK}")
        if isinstance(own_alpha, bool) or not isinstance(own_alpha, int | float) or not 0 < own_alpha < 1e12:
            raise fields.fail("alpha_pattern", f"gives {name} the alpha {str(own_alpha)[:40]!r}, not a positive number")
        wanted[name] = own_rank, own_alpha / (math.sqrt(own_rank) if slow else own_rank)
    return wanted


def _targets(fields: Fields, config: ModelConfig) -> list[str]:
    """The projections that target_modules, exclude_modules and layers_to_transform leave, as peft chooses them."""
    every = [name for name, _ in projections(config)]
    beside = ["lm_head", "model.embed_tokens"]
    targets = fields.get("target_modules")
    chosen = set(every)
    if targets != "all-linear":
        for target in _names(fields, "target_modules"):
            found = [name for name in (*every, *beside) if _chooses(target, name, isinstance(targets, str))]
            if not found or any(name in beside for name in found):
                raise InputError(
                    f"{CONFIG}: target_modules names {target[:80]!r}, which is {'none' if not found else 'not one'} of the projections of "
                    f"this model's {config.num_layers} layers",
                    f"an adapter may have {', '.join(PARTS)}",
                    field="target_modules",
                )
        chosen = {name for name in every for target in _names(fields, "target_modules") if _chooses(target, name, isinstance(targets, str))}
    for target in _names(fields, "exclude_modules"):
        chosen -= {name for name in every if _chooses(target, name, isinstance(fields.get("exclude_modules"), str))}
    layers = fields.get("layers_to_transform")
    if layers not in _EMPTY and not (isinstance(targets, str) and targets != "all-linear"):  # a pattern says it all itself
        numbers = layers if isinstance(layers, list) else [layers]
        if any(isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < config.num_layers for number in numbers):
            raise fields.fail("layers_to_transform", f"is {str(layers)[:40]!r}, not layers of a model that has {config.num_layers}")
        if fields.get("layers_pattern") not in (*_EMPTY, "layers", ["layers"]):
            raise fields.fail("layers_pattern", "is not 'layers', which is where this model has them")
        chosen = {name for name in chosen if int(name.split(".")[2]) in numbers}
    if not chosen:
        raise fields.fail("target_modules", "leaves no projection")
    return [name for name in every if name in chosen]


def _names(fields: Fields, key: str) -> list[str]:
    """A list of module names, or one pattern; empty when the key says nothing."""
    value = fields.get(key)
    names = [] if value in _EMPTY else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_PATTERNS or not all(isinstance(name, str) for name in names):
        raise fields.fail(key, f"is not a pattern, nor a list of at most {MAX_PATTERNS} module names")
    return names


def _chooses(target: str, name: str, pattern: bool) -> bool:
    return _matches(target, name) if pattern else name == target or name.endswith(f".{target}")


def _patterns(fields: Fields, key: str) -> dict[str, Any]:
    value = fields.get(key) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise fields.fail(key, f"is not an object of at most {MAX_PATTERNS} patterns")
    return value


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What the first pattern says that matches the end of the name, from its beginning or from a dot on."""
    return next((value for pattern, value in patterns.items() if _matches(rf"(?:.*\.)?(?:{pattern})", name)), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        _expression(pattern).validate_python(name)
    except ValidationError:
        return False
    return True


@functools.lru_cache(MAX_PATTERNS)
def _expression(pattern: str) -> TypeAdapter[str]:
    """A whole-string pattern in the linear-time engine of Rust's regex: Python's own would follow a hostile file for ever."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise FormatError(f"{CONFIG} has a pattern of {len(pattern):,} characters, more than {MAX_PATTERN_LENGTH:,}", "name the modules")
    try:
        return TypeAdapter(Annotated[str, StringConstraints(pattern=f"^(?:{pattern})$")])
    except SchemaError as error:
        raise InputError(
            f"{CONFIG}: the pattern {pattern[:80]!r} is not supported",
            "write it without look-around and back references, or name the modules",
        ) from error
