"""Deja Vu (Liu et al., ICML 2023): neurons predicted one layer ahead, on a ReLU model trained here, and on SmolLM2, whose neurons are never zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from armillary.data.corpora import corpus_files
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.load import load
from armillary.models.neuron_predictor import NeuronPredictor, reads
from armillary.reproduce.registry import Experiment, Result, Row
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.sparse_forward import SparseForward
from armillary.train.config import OptimizerConfig
from armillary.train.microbatch import MicroBatch
from armillary.train.neuron_predictors import active, record, train_predictors
from armillary.train.optimizers import choose
from armillary.train.parallel.apply import Single
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

RELU: Final = ModelConfig("llama", 256, 128, 512, 4, 4, 4, 32, 256, activation="relu")
Mask = Callable[[int, Tensor], Tensor]
"""(layer, neurons [tokens, n]) -> which of them stay, [tokens, n] bool."""


class Bytes:
    """`Batches` of random windows of a text's bytes, `rows` of `length` each."""

    def __init__(self, text: Tensor, rows: int, length: int, seed: int = 0) -> None:
        self._text, self._rows, self._length = text, rows, length
        self._random = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Sequence[MicroBatch]]:
        return self

    def __next__(self) -> Sequence[MicroBatch]:
        starts = torch.randint(len(self._text) - self._length, (self._rows, 1), generator=self._random)
        places = starts + torch.arange(self._length)
        positions = torch.arange(self._length).repeat(self._rows)
        return [MicroBatch(self._text[places].flatten(), self._text[places + 1].flatten(), positions, (self._length,) * self._rows)]

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._random.set_state(state["random"])


def trained(config: ModelConfig, text: Tensor, *, steps: int, rows: int, length: int) -> Decoder:
    """A decoder from scratch by our trainer."""
    torch.manual_seed(0)
    decoder = Decoder(config).train()
    optimizer = choose.factory(OptimizerConfig.model_validate({"lr": 3e-3}))
    Trainer(Single(decoder), optimizer, Schedule("cosine", steps, steps // 20, 0.1), Bytes(text, rows, length)).run()
    return decoder.eval()


def losses(decoder: Decoder, windows: Sequence[Tensor], mask: Mask | None = None) -> float:
    """Mean -ln p of every token of each window but the first; neurons that `mask` does not keep count as zero."""
    handles = []
    if mask is not None:
        for index, layer in enumerate(decoder.layers):

            def keep(_: nn.Module, arguments: tuple[Tensor, ...], index: int = index) -> tuple[Tensor]:
                return (arguments[0] * mask(index, arguments[0]),)

            handles.append(layer.get_submodule("mlp.down_proj").register_forward_pre_hook(keep))
    try:
        found = []
        with torch.inference_mode():
            for window in windows:
                logits = decoder(window, torch.arange(len(window)), CausalAttend([len(window)]))
                found.append(functional.cross_entropy(logits[:-1].float(), window[1:], reduction="none"))
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.cat(found).double().mean())


class Predicted:
    """A `Mask` by predictors, as the executor would choose for one token at a time. `density` and `recall` are of what was masked so far."""

    def __init__(self, decoder: Decoder, predictors: Sequence[NeuronPredictor], share: float | None) -> None:
        self._predictors, self._share = predictors, share
        self._kept = self._all = self._hit = self._wanted = 0
        self._read: dict[int, Tensor] = {}
        self._handles = [
            layer.get_submodule("self_attn").register_forward_pre_hook(self._hook(index)) for index, layer in enumerate(decoder.layers)
        ]

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: self._read.__setitem__(index, arguments[0])

    def __call__(self, layer: int, inner: Tensor) -> Tensor:
        logits = self._predictors[layer](self._read[reads(layer)])
        kept = logits > 0 if self._share is None else active(logits, self._share)
        wanted = active(inner.abs(), self._share)
        self._kept += int(kept.sum())
        self._all += kept.numel()
        self._hit += int((kept & wanted).sum())
        self._wanted += int(wanted.sum())
        return kept

    @property
    def density(self) -> float:
        return self._kept / self._all

    @property
    def recall(self) -> float:
        return self._hit / self._wanted

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def one_by_one(forward: SparseForward, window: Tensor) -> float:
    """`losses` of a window that the executor computes token by token, as it would an answer."""
    table, total = range(-(-len(window) // forward.cache.block_size)), 0.0
    with torch.inference_mode():
        for position, token in enumerate(window[:-1].tolist()):
            logits = forward.logits(FlatBatch([token], [position], [Span(position, 1, table)], [0])).values
            total += float(functional.cross_entropy(logits.double(), window[position + 1 : position + 2]))
    return total / (len(window) - 1)


def ratio(loss: float, dense: float) -> float:
    """Perplexity over the dense model's."""
    return math.exp(loss - dense)


def largest(share: float) -> Mask:
    """The oracle: the largest neurons of each token, known only after they have been computed."""
    return lambda _, inner: active(inner.abs(), share)


def run() -> Result:
    files = corpus_files("sotu")
    raw = [file.read_bytes() for file in files[-24:]]
    text, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in (raw[:-2], raw[-2:]))
    decoder = trained(RELU, text, steps=150, rows=16, length=128)
    recording = record(decoder, [text[start : start + 256] for start in range(0, len(text) - 256, len(text) // 48)])
    fired = sum(float(active(sizes, None).float().mean()) for sizes in recording.sizes) / len(recording.sizes)
    predictors = train_predictors(recording, rank=128, steps=300)
    windows = list(held_out[: 16 * 256].view(16, 256))
    dense = losses(decoder, windows)
    mask = Predicted(decoder, predictors, None)
    predicted = losses(decoder, windows, mask)
    mask.close()
    forward = SparseForward(decoder, predictors, num_blocks=16, block_size=16)
    executed = one_by_one(forward, windows[0])
    mask_of_one = Predicted(decoder, predictors, None)
    masked = losses(decoder, windows[:1], mask_of_one)
    mask_of_one.close()
    paper = "section 1: 85 % contextual sparsity in OPT-175B (95 % of the MLPs' neurons) without loss"
    model = "a ReLU model trained here"
    rows = [
        Row(
            f"neurons that are zero, {model}",
            "%",
            95,
            paper,
            100 * (1 - fired),
            40,
            100,
            "40 or more: 1 M parameters and no pretraining of days",
        ),
        Row(f"neurons left out by the predictors, {model}", "%", 95, paper, 100 * (1 - mask.density), 40, 100, "as above"),
        Row("active neurons that the predictors found", "%", 100, "an oracle", 100 * mask.recall, 70, 100, "70 or more"),
        Row(
            f"perplexity with predicted neurons over dense, {model}",
            "x",
            1.0,
            "section 5.1: no loss",
            ratio(predicted, dense),
            0.95,
            1.1,
            "10 %",
        ),
        Row(
            f"perplexity with the largest eighth of the neurons over dense, {model}",
            "x",
            1.0,
            "section 2: an oracle loses nothing",
            ratio(losses(decoder, windows, largest(0.125)), dense),
            0.95,
            1.1,
            "10 %",
        ),
        Row(
            "the executor's perplexity, token by token, over that with masked neurons",
            "x",
            1.0,
            "by construction",
            ratio(executed, masked),
            0.999,
            1.001,
            "0.1 %: rounding moves neurons over the threshold",
        ),
    ]
    return Result((*rows, *smollm2()))


def smollm2() -> list[Row]:
    """The same for a SiLU model, where nothing is ever zero. There is no published figure: the rows only have to be numbers."""
    loaded = load("smollm2")
    ids = torch.tensor(loaded.tokenizer.encode(corpus_files("sotu")[-1].read_text("utf-8"), special=False)[:4096])
    decoder, windows = loaded.decoder.eval(), [ids[-512:]]
    predictors = train_predictors(record(decoder, list(ids[:2048].view(4, 512))), rank=128, share=0.25, steps=120, rows=128, lr=5e-3)
    dense = losses(decoder, windows)
    source, tolerance = "SmolLM2 has no ReLU: nothing was claimed for it", "any number: what leaving neurons out costs here"
    rows = [
        Row(
            f"perplexity with the largest {share:.0%} of the neurons over dense, SmolLM2",
            "x",
            1.0,
            source,
            ratio(losses(decoder, windows, largest(share)), dense),
            0,
            1e9,
            tolerance,
        )
        for share in (0.5, 0.25, 0.125)
    ]
    for share in (0.5, 0.25):
        mask = Predicted(decoder, predictors, share)
        found = ratio(losses(decoder, windows, mask), dense)
        mask.close()
        rows.append(
            Row(f"perplexity with the {share:.0%} of neurons predicted over dense, SmolLM2", "x", 1.0, source, found, 0, 1e9, tolerance)
        )
        rows.append(Row(f"of SmolLM2's largest {share:.0%} of neurons, found", "%", 100, source, 100 * mask.recall, 0, 100, tolerance))
    return rows


EXPERIMENT: Final = Experiment(
    name="deja-vu",
    title="Deja Vu: contextual sparsity for efficient LLMs at inference time",
    paper="Liu et al., ICML 2023",
    claim="OPT-175B more than 2x faster than FasterTransformer at no loss: each token needs a few neurons, and a small network names them a layer ahead",
    setup=f"a ReGLU decoder of {RELU.parameters() / 1e6:.1f} M parameters trained here on bytes of State of the Union addresses, predictors of rank "
    "128 that read the attention input of the layer before; then SmolLM2 (SwiGLU), predictors for its largest quarter from 2,048 tokens of text. "
    "Speed is not measured here: bench/contextual_sparsity.py does",
    takes="one to two minutes",
    run=run,
)
