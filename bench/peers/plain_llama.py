"""A Llama and its training loop as people write them by hand (in the manner of nanoGPT): the peer of `bench/learns.py`.

Shares no code with Armillary: padded [rows, length] batches, one mask, all logits at once, torch's AdamW, clipping and cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, targets, positions, documents: [rows, length]


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x, rotate, mask):
        rows, length, size = x.shape
        q, k, v = (p(x).view(rows, length, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, size))


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(size, eps), Norm(size, eps)
        self.self_attn, self.mlp = Attention(size, heads), MLP(size, inner)

    def forward(self, x, rotate, mask):
        x = x + self.self_attn(self.input_layernorm(x), rotate, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Parameter names follow Hugging Face, without the leading `model.`; the head is the embedding's weight."""

    def __init__(self, vocabulary: int, size: int, inner: int, layers: int, heads: int, eps: float = 1e-5, theta: float = 1e4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size, inner, heads, eps) for _ in range(layers))
        self.norm = Norm(size, eps)
        self.frequencies = theta ** (-torch.arange(0, size // heads, 2) / (size // heads))

    def forward(self, tokens, positions, documents):
        angles = positions[:, None, :, None] * self.frequencies  # [rows, 1, length, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()

        def rotate(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rotate, mask)
        return self.norm(x) @ self.embed_tokens.weight.T


def loss_of(model: Llama, rows: Rows) -> torch.Tensor:
    tokens, targets, positions, documents = rows
    return F.cross_entropy(model(tokens, positions, documents).flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def validation_loss(model: Llama, batches: list[Rows]) -> float:
    return sum(loss_of(model, rows).item() * int((rows[1] != -100).sum()) for rows in batches) / sum(
        int((r[1] != -100).sum()) for r in batches
    )


def train(
    model: Llama,
    batches: Iterator[Rows],
    validation: list[Rows],
    *,
    steps: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    every: int,
    told: Callable[[int, float, float | None], None],
) -> None:
    """AdamW (0.9, 0.95), decay on matrices, gradient norm at most 1, cosine to 0. `told(step, training loss, validation loss)`."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    told(0, float("nan"), validation_loss(model, validation))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (
                (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            )
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        due = (step + 1) % every == 0 or step + 1 == steps
        told(step + 1, loss.item(), validation_loss(model, validation) if due else None)
