"""Trains Deja Vu's predictors for a decoder: what its neurons did on a text, learnt from what attention read one layer ahead (Liu et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.activations import Activation
from armillary.kernels.attention import CausalAttend
from armillary.kernels.gated import activate
from armillary.models.decoder import Decoder
from armillary.models.neuron_predictor import NeuronPredictor, reads


@dataclass(frozen=True, slots=True)
class Recording:
    """What a decoder did: for each layer what attention read, [tokens, d], and how large each neuron was, [tokens, neurons] in half precision."""

    inputs: list[Tensor]
    sizes: list[Tensor]


def record(decoder: Decoder, windows: Sequence[Tensor]) -> Recording:
    """Run the decoder over windows of tokens, [length] int64 each."""
    inputs: list[list[Tensor]] = [[] for _ in decoder.layers]
    sizes: list[list[Tensor]] = [[] for _ in decoder.layers]
    activation: Activation = decoder.config.activation
    handles = []
    for index, layer in enumerate(decoder.layers):

        def attention_reads(_: object, arguments: tuple[Tensor, ...], index: int = index) -> None:
            inputs[index].append(arguments[0].clone())

        def gate_gives(_: object, __: object, out: tuple[Tensor, Tensor], index: int = index) -> None:
            sizes[index].append((activate(out[0], activation) * out[1]).abs().half())

        handles.append(layer.get_submodule("self_attn").register_forward_pre_hook(attention_reads))
        handles.append(layer.get_submodule("mlp.gate_up").register_forward_hook(gate_gives))
    try:
        with torch.no_grad():
            for window in windows:
                decoder.hidden(window, torch.arange(len(window)), CausalAttend([len(window)]))
    finally:
        for handle in handles:
            handle.remove()
    return Recording([torch.cat(one) for one in inputs], [torch.cat(one) for one in sizes])


def active(sizes: Tensor, share: float | None) -> Tensor:
    """Which neurons count as active, [tokens, neurons] bool: those that are not zero (None, for a ReLU), or the largest `share` of each token."""
    if share is None:
        return sizes > 0
    count = max(1, round(share * sizes.shape[1]))
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, sizes.topk(count, 1).indices, True)


def train_predictors(
    recording: Recording,
    *,
    rank: int,
    share: float | None = None,
    steps: int = 300,
    rows: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> list[NeuronPredictor]:
    """A predictor a layer by binary cross-entropy over its neurons, with AdamW and a learning rate that falls to zero. `share` as in `active`.

    Raises InputError for a recording of fewer tokens than `rows`.
    """
    tokens = len(recording.inputs[0])
    if tokens < rows:
        raise InputError(f"a recording of {tokens} tokens is less than a batch of {rows}", "record more text", field="rows")
    found = []
    for layer, sizes in enumerate(recording.sizes):
        torch.manual_seed(seed + layer)
        x, wanted = recording.inputs[reads(layer)], active(sizes, share)
        one = NeuronPredictor(x.shape[1], rank, sizes.shape[1])
        optimizer = torch.optim.AdamW(one.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            chosen = torch.randint(tokens, (rows,))
            loss = functional.binary_cross_entropy_with_logits(one(x[chosen]), wanted[chosen].float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        found.append(one.eval().requires_grad_(False))
    return found
