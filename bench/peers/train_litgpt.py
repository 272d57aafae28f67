"""LitGPT training in fp32: its model and loss in the loop of its `pretrain` (which compiles the model) and `finetune_full` (which does not)."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import lightning
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from peers.training import Recipe, measure, report
from safetensors.torch import load_file


def main(path: str, variant: str) -> None:
    recipe = Recipe.load(path)
    torch.set_num_threads(recipe.threads)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    model = load(Path(recipe.hf_folder)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    model = fabric.setup(torch.compile(model) if variant == "compiled" else model)
    optimizer = fabric.setup_optimizers(optimizer)

    def step(index: int) -> float:
        tokens = torch.tensor(recipe.batch(index))
        # As finetune_full does it: chunks of 128 rows of logits; pretrain takes them whole.
        loss = chunked_cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], chunk_size=0 if variant == "compiled" else 128)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    report("litgpt", version("litgpt"), variant, recipe, measure(step, recipe))


def load(folder: Path) -> GPT:
    """The HF folder's Llama as LitGPT's model, the head tied as its `pretrain --train.tie_embeddings` ties it."""
    raw = json.loads((folder / "config.json").read_text())
    layers, hidden, heads = raw["num_hidden_layers"], raw["hidden_size"], raw["num_attention_heads"]
    config = Config(
        name="bench",
        block_size=raw["max_position_embeddings"],
        padded_vocab_size=raw["vocab_size"],
        vocab_size=raw["vocab_size"],
        n_layer=layers,
        n_head=heads,
        n_query_groups=raw["num_key_value_heads"],
        head_size=raw.get("head_dim") or hidden // heads,
        n_embd=hidden,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=raw["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=raw["intermediate_size"],
        rope_base=int((raw.get("rope_parameters") or raw)["rope_theta"]),
    )
    names = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight"}
    parts = {
        "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
    }  # fmt: skip
    names |= {f"model.layers.{i}.{hf}.weight": f"transformer.h.{i}.{lit}.weight" for i in range(layers) for hf, lit in parts.items()}
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = {lit: weights[hf] for hf, lit in names.items()}
    for i in range(layers):
        qkv = [weights[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"]
        state[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat(qkv)
    state["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    model = GPT(config)
    model.load_state_dict(state)
    if raw["tie_word_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
