"""Beam search against the plainest loop, exhaustive search and transformers; its forks share memory."""

import random

import pytest
import torch
from models import VOCABULARY, loaded, logits_of, tiny

from armillary.core.errors import InputError
from armillary.models.weights import hf_parameters
from armillary.serve.beam import BeamParams
from armillary.serve.llm import LLM
from armillary.serve.request import Request, SamplingParams

END = VOCABULARY - 1


def plain(decoder, prompt, params, eos=(END,)):
    """Every beam recomputed from its first token, candidates of the whole vocabulary."""
    live, ended = [((), 0.0)], []
    for step in range(1, params.max_tokens + 1):
        rows = [logits_of(decoder, [*prompt, *tokens])[-1].log_softmax(-1).tolist() for tokens, _ in live]
        all_of_them = [((*tokens, t), total + row[t]) for (tokens, total), row in zip(live, rows, strict=True) for t in range(VOCABULARY)]
        all_of_them.sort(key=lambda one: -one[1])
        ended += [one for one in all_of_them[: params.width] if one[0][-1] in eos]
        live = [one for one in all_of_them if one[0][-1] not in eos][: params.width]
        ended.sort(key=lambda one: -one[1] / len(one[0]) ** params.length_penalty)
        del ended[params.width :]
        best = live[0][1] / (params.max_tokens if params.length_penalty > 0 else step) ** params.length_penalty
        if len(ended) == params.width and ended[-1][1] / len(ended[-1][0]) ** params.length_penalty >= best:
            return ended
    ended += live
    return sorted(ended, key=lambda one: -one[1] / len(one[0]) ** params.length_penalty)[: params.width]


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (5, 2.0)])
def test_beams_are_those_of_the_plainest_loop(width, penalty):
    rng = random.Random(width)
    decoder = tiny(seed=width)
    llm = LLM(loaded(decoder), kv_blocks=200, block_size=4, max_batch_tokens=64, backend="torch")
    prompts = [[rng.randrange(END) for _ in range(length)] for length in (5, 1, 22)]
    params = BeamParams(width, 7, penalty)
    for prompt, found in zip(prompts, llm.beam_search(prompts, params), strict=True):
        wanted = plain(decoder, prompt, params)
        assert [beam.tokens for beam in found] == [tokens for tokens, _ in wanted]
        assert [beam.logprob for beam in found] == pytest.approx([total for _, total in wanted], abs=1e-4)
    assert llm.engine.stats.forked_tokens > 0
    assert llm.engine.snapshot()["blocks"]["used"] == 0
    llm.engine.check()


def test_a_wide_beam_finds_the_best_of_all():
    decoder = tiny(seed=8)
    first = logits_of(decoder, [1, 2, 3])[-1].log_softmax(-1).tolist()
    second = [logits_of(decoder, [1, 2, 3, token])[-1].log_softmax(-1).tolist() for token in range(VOCABULARY)]
    best = max((first[a] + second[a][b], (a, b)) for a in range(VOCABULARY) for b in range(VOCABULARY))
    llm = LLM(loaded(decoder), kv_blocks=200, block_size=4, max_running=64)
    [found] = llm.beam_search([1, 2, 3], BeamParams(64, 2, ignore_eos=True))
    assert found[0].tokens == best[1]
    assert found[0].logprob == pytest.approx(best[0], abs=1e-4)


@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_beams_are_those_of_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    decoder = tiny(seed=21)
    config = decoder.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim, max_position_embeddings=config.max_context, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope.theta, tie_word_embeddings=config.tie_embeddings, bos_token_id=0, eos_token_id=END, pad_token_id=END,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(hf_parameters(decoder), strict=False)
    rng = random.Random(4)
    llm = LLM(loaded(decoder), kv_blocks=200, block_size=4)
    for length in (3, 9):
        prompt = [rng.randrange(END) for _ in range(length)]
        with torch.no_grad():
            wanted = theirs.generate(
                torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=6, do_sample=False, length_penalty=penalty,
                early_stopping=False, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        [found] = llm.beam_search([prompt], BeamParams(4, 6, penalty))
        texts = [[t for t in row[length:].tolist() if t != END] for row in wanted.sequences]
        assert [[t for t in beam.tokens if t != END] for beam in found] == texts
        assert [beam.score for beam in found] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)


def test_beams_that_do_not_fit_are_computed_again():
    decoder = tiny(seed=3)
    prompt = list(range(20))
    roomy = LLM(loaded(decoder), kv_blocks=200, block_size=4).beam_search([prompt], BeamParams(4, 8))
    tight = LLM(loaded(decoder), kv_blocks=10, block_size=4, prefix_cache="off")
    assert tight.beam_search([prompt], BeamParams(4, 8)) == [
        [type(beam)(beam.tokens, pytest.approx(beam.logprob, abs=1e-4), pytest.approx(beam.score, abs=1e-4)) for beam in roomy[0]]
    ]
    assert tight.engine.snapshot()["blocks"]["used"] == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="width is 0: give a number from 1 to 64"):
        BeamParams(0)
    llm = LLM(loaded(tiny()), kv_blocks=10, block_size=4)
    parent = Request("a", (1, 2, 3), SamplingParams(2))
    with pytest.raises(InputError, match="'b' does not begin with the prompt of its parent 'a'"):
        llm.engine.submit(Request("b", (1, 3, 3), SamplingParams(2), parent=parent))
