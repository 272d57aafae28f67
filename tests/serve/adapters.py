"""Random adapters for tiny models: in memory, as peft's files, and merged into the weights."""

import copy
import json

import torch
from safetensors.torch import save_file

from armillary.kernels.cpu_library import PARTS
from armillary.kernels.low_rank import LowRank
from armillary.models.lora import Adapter
from armillary.models.lora_config import projections
from armillary.models.weights import hf_parameters


def adapter(config, seed, rank=4, scale=2.0, parts=PARTS, std=0.2):
    """An adapter large enough to change what a tiny model says."""
    generator = torch.Generator().manual_seed(seed)
    layers = [[] for _ in range(config.num_layers)]
    for index, (name, (n, k)) in enumerate(projections(config)):
        low = None
        if name.rpartition(".")[2] in parts:
            a, b = (torch.randn(shape, generator=generator) * std for shape in ((rank, k), (n, rank)))
            low = LowRank(a, b, scale)
        layers[index // len(PARTS)].append(low)
    return Adapter(tuple(map(tuple, layers)))


def merged(decoder, low_rank):
    """The decoder with W + scale B A in place of each W."""
    decoder = copy.deepcopy(decoder)
    parameters = hf_parameters(decoder)
    lows = [low for layer in low_rank.layers for low in layer]
    with torch.no_grad():
        for (name, _), low in zip(projections(decoder.config), lows, strict=True):
            if low is not None:
                weight = parameters[f"{name}.weight"]
                weight.copy_(weight.double() + low.scale * (low.b.double() @ low.a.double()))
    return decoder


def write(folder, config, low_rank, dtype=torch.float32, **changes):
    """As peft's save_pretrained writes it; all projections of one rank and scale. `changes` to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    lows = [low for layer in low_rank.layers for low in layer]
    tensors, parts = {}, set()
    for (name, _), low in zip(projections(config), lows, strict=True):
        if low is not None:
            rank, scale = low.rank, low.scale
            parts.add(name.rpartition(".")[2])
            for side, values in (("A", low.a), ("B", low.b)):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values.to(dtype)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank * scale, "target_modules": sorted(parts), "bias": "none",
        "inference_mode": True, "lora_dropout": 0.05, "fan_in_fan_out": False, "modules_to_save": None, "base_model_name_or_path": "tiny",
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return folder
