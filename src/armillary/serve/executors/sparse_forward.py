"""The forward pass with contextual sparsity (Liu et al., "Deja Vu", ICML 2023): single tokens compute only the neurons that are predicted to matter.

While layer l's attention runs, a thread asks the predictor of layer l + 1, which reads the same input, so its answer costs no time of its own.
Prompts are computed whole: their tokens together need nearly every neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.activations import Activation
from armillary.kernels.active_rows import active_rows
from armillary.kernels.gated import gated
from armillary.kernels.low_rank import Layer
from armillary.models.decoder import MLP, Decoder
from armillary.models.neuron_predictor import NeuronPredictor, reads
from armillary.serve.executors.torch_adapters import TorchAdapter
from armillary.serve.executors.torch_forward import TorchForward, sharing_copy

MOST_TOKENS = 8  # of a batch that is computed sparsely: more need nearly all neurons together


class SparseForward(TorchForward):
    """`Forward` whose MLPs compute the union of the neurons predicted for the tokens of the batch.

    `share`: of a layer's neurons, the likeliest ones a token (None: those that are likelier active than not). An approximation: what a
    sequence computes depends on its company through the union. `computed` and `possible` count neurons over all sparse steps.
    """

    own_threads = False

    def __init__(
        self, decoder: Decoder, predictors: Sequence[NeuronPredictor], *, num_blocks: int, block_size: int, share: float | None = None
    ) -> None:
        model = sharing_copy(decoder)
        layers: list[_ActiveMLP] = []
        for layer in model.layers:
            assert isinstance(layer.mlp, MLP)
            layers.append(_ActiveMLP(layer.mlp))
            layer.set_submodule("mlp", layers[-1])
        super().__init__(model, num_blocks=num_blocks, block_size=block_size, in_place=True)
        self.name = f"torch, contextual sparsity ({self.library})"
        self.packed_bytes += sum(tensor.nbytes for mlp in layers for tensor in (mlp.gate, mlp.up, mlp.down))
        self._ahead = _Lookahead(predictors, layers, share)
        for index, layer in enumerate(self.decoder.layers):
            layer.get_submodule("self_attn").register_forward_pre_hook(self._ahead.hook(index))

    @property
    def density(self) -> float:
        """Neurons computed over all, in the sparse steps so far; 1 before the first."""
        return self._ahead.computed / self._ahead.possible if self._ahead.possible else 1.0

    def pack_adapter(self, layers: Sequence[Layer]) -> TorchAdapter:
        raise InputError("adapters change which neurons are active, and the predictors do not know them", "serve without sparsity")

    def with_layers(self, kept: Sequence[int]) -> TorchForward:
        raise InputError("predictors look one layer ahead, and a draft leaves layers out", "speculate with ngram, or a draft model")


class _ActiveMLP(nn.Module):
    """The layer as three matrices of neurons, [neurons, d] each, and the rows that its next call is to compute."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        if mlp.down_proj.bias is not None:
            raise InputError("contextual sparsity takes MLPs without biases", "serve without sparsity", field="sparsity")
        gate, up = (mlp.gate_up.get_parameter(f"{name}.weight").detach() for name in mlp.gate_up.names)
        self.gate: Tensor = gate.contiguous()
        self.up: Tensor = up.contiguous()
        self.down: Tensor = mlp.down_proj.weight.detach().T.contiguous()
        self.activation: Activation = mlp.activation
        self.ahead: _Lookahead | None = None
        self.index: int = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self.ahead.rows(self.index) if self.ahead is not None else None
        if rows is None:
            return gated(functional.linear(x, self.gate), functional.linear(x, self.up), self.activation) @ self.down
        return active_rows(x.contiguous(), rows, self.gate, self.up, self.down, self.activation)


class _Lookahead:
    """Asks each layer's predictor when the attention of the layer before begins, on a thread of its own."""

    def __init__(self, predictors: Sequence[NeuronPredictor], layers: Sequence[_ActiveMLP], share: float | None) -> None:
        self._predictors, self._layers, self._share = predictors, layers, share
        self._asked: dict[int, Future[Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "lookahead")
        self.computed = self.possible = 0
        for index, layer in enumerate(layers):
            layer.ahead, layer.index = self, index

    def hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        mine = [layer for layer in range(len(self._layers)) if reads(layer) == index]

        def attention_reads(_: object, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            self._asked = {layer: future for layer, future in self._asked.items() if layer == index}  # a pass that failed leaves some
            if len(x) <= MOST_TOKENS:
                self._asked |= {layer: self._thread.submit(self._predict, layer, x) for layer in mine}

        return attention_reads

    def rows(self, layer: int) -> Tensor | None:
        """The neurons to compute; None for all of them."""
        asked = self._asked.pop(layer, None)
        if asked is None:
            return None
        rows = asked.result()
        self.computed += len(rows)
        self.possible += len(self._layers[layer].gate)
        return rows

    def _predict(self, layer: int, x: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = self._predictors[layer](x)
            if self._share is None:
                likely = (logits > 0).any(0)
            else:
                count = max(1, round(self._share * logits.shape[1]))
                likely = torch.zeros(logits.shape[1], dtype=torch.bool)
                likely[logits.topk(count, 1).indices.flatten()] = True
            return likely.nonzero()[:, 0].int()
