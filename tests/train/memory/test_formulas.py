"""Korthikanti et al.'s numbers, and their 34 + 5as/h measured on their block."""

import pytest
import torch
from torch import nn

from armillary.train.memory.counter import SavedTensors
from armillary.train.memory.formulas import GPT, GPT3_175B, MT_NLG_530B


@pytest.mark.parametrize(
    ("options", "megabytes"),
    [
        ({}, 2868.9),
        ({"t": 8}, 578.8),
        ({"t": 8, "sequence_parallel": True}, 358.6),
        ({"t": 8, "sequence_parallel": True, "recompute": "selective"}, 107.0),
        ({"recompute": "full"}, 50.3),
    ],
)
def test_a_layer_of_gpt3(options, megabytes):
    assert GPT3_175B.layer_bytes(**options) / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_the_share_of_the_attention_core_and_what_computing_it_again_costs():
    assert [round(100 * model.attention_share, 1) for model in (GPT3_175B, MT_NLG_530B)] == [70.2, 65.3]
    assert [round(100 * model.selective_overhead, 1) for model in (GPT3_175B, MT_NLG_530B)] == [2.7, 1.6]


def dropout(x):
    return torch.native_dropout(x, 0.1, True)[0]  # keeps a mask of bytes, as the paper counts


class PaperBlock(nn.Module):
    """Figure 2 of the paper: x is [s, b, h]; 16 bits, every score formed, GELU, dropout in three places."""

    def __init__(self, h, a):
        super().__init__()
        self.a = a
        self.norms = nn.ModuleList([nn.LayerNorm(h), nn.LayerNorm(h)])
        self.q, self.k, self.v, self.out = (nn.Linear(h, h) for _ in range(4))
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def heads(self, x):
        s, b, h = x.shape
        return x.view(s, b * self.a, h // self.a).transpose(0, 1)

    def forward(self, x):
        s, b, h = x.shape
        y = self.norms[0](x)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=(h // self.a) ** -0.5)
        context = torch.bmm(dropout(scores.softmax(-1)), v)  # [b a, s, h / a]
        x = x + dropout(self.out(context.transpose(0, 1).reshape(s, b, h)))
        return x + dropout(self.down(nn.functional.gelu(self.up(self.norms[1](x)))))


@pytest.mark.parametrize(("s", "b", "h", "a"), [(32, 2, 64, 4), (48, 1, 32, 8), (16, 3, 48, 1)])
def test_the_papers_block_keeps_what_the_formula_says_to_the_byte(s, b, h, a):
    block = PaperBlock(h, a).bfloat16()
    x = torch.randn(s, b, h, dtype=torch.bfloat16, requires_grad=True)
    with SavedTensors(block.parameters()) as saved:
        out = block(x)
    statistics = 2 * 2 * s * b * out.element_size()  # mean and deviation of a row in two norms, which the paper leaves out
    assert saved.bytes - statistics == round(GPT(s, b, h, a, layers=1).layer_bytes())
    out.sum().backward()
    del out
    assert saved.bytes == 2 * s * b * h  # all that is left is the input, which we hold
