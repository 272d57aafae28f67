"""Activation memory and recomputation in closed form (Korthikanti et al., MLSys 2023), for the GPT block of that paper in 16 bits.

Named references, not estimates of our models: those have other blocks, and are counted (`predict`).
s, b: sequence and micro-batch; h: width; a: heads; t: tensor-parallel ranks; L: layers; V: vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GPT:
    """A model of the paper."""

    s: int
    b: int
    h: int
    a: int
    layers: int
    vocab: int = 51_200

    @property
    def sbh(self) -> int:
        return self.s * self.b * self.h

    @property
    def attention(self) -> float:
        """5as/h: the attention core's scores, their softmax and its dropout, in units of sbh bytes."""
        return 5 * self.a * self.s / self.h

    def layer_bytes(self, t: int = 1, sequence_parallel: bool = False, recompute: str = "none") -> float:
        """Bytes of one layer's activations on one rank. recompute: none, selective (the attention core) or full."""
        if recompute == "full":
            return 2 * self.sbh
        attention = 0.0 if recompute == "selective" else self.attention
        if sequence_parallel:
            return self.sbh * (34 + attention) / t
        return self.sbh * (10 + (24 + attention) / t)

    @property
    def attention_share(self) -> float:
        """Share of a layer's activations that selective recomputation does not keep."""
        return self.attention / (34 + self.attention)

    @property
    def model_flops(self) -> float:
        """Of one iteration over b sequences."""
        return self._flops(self.s / (6 * self.h))

    @property
    def selective_overhead(self) -> float:
        """Arithmetic that recomputing the attention core adds, as a share of the model's."""
        return self._flops(self.s / (3 * self.h)) / self.model_flops - 1

    def _flops(self, attention: float) -> float:
        return 72 * self.b * self.layers * self.s * self.h**2 * (1 + attention + self.vocab / (12 * self.h * self.layers))


GPT3_175B = GPT(s=2048, b=1, h=12_288, a=96, layers=96)
MT_NLG_530B = GPT(s=2048, b=1, h=20_480, a=128, layers=105)
