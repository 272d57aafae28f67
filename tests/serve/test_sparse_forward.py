"""Contextual sparsity: with every neuron predicted it is the dense model, with the predicted ones what masking the others gives; and a ReLU model is served as others are."""

import pytest
import torch
from models import VOCABULARY, greedy, loaded, logits_of, tiny
from test_equality import BACKENDS, forward_of, logits_in_chunks

from armillary.core.errors import FormatError, InputError
from armillary.models.families import from_hf, to_hf
from armillary.models.neuron_predictor import NeuronPredictor, load_predictors, save_predictors
from armillary.reproduce.deja_vu import Bytes, Predicted, losses, one_by_one
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.local import LocalExecutor
from armillary.serve.executors.sparse_forward import SparseForward
from armillary.serve.llm import LLM
from armillary.serve.request import Request, SamplingParams
from armillary.train.neuron_predictors import active, record, train_predictors

TOKENS = torch.randint(VOCABULARY, (600,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder():
    return tiny(seed=5, num_layers=3, activation="relu")


@pytest.fixture(scope="module")
def recording(decoder):
    return record(decoder, list(TOKENS.view(3, 200)))


@pytest.fixture(scope="module")
def predictors(recording):
    return train_predictors(recording, rank=48, steps=150)


def everything(decoder):
    """Predictors that name every neuron."""
    found = []
    for _ in decoder.layers:
        one = NeuronPredictor(decoder.config.hidden_size, 1, decoder.config.intermediate_size)
        one.out.bias.data.fill_(1e6)
        found.append(one)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_relu_model_is_computed_as_the_others_are(backend, decoder):
    tokens = TOKENS[:50].tolist()
    got = logits_in_chunks(forward_of(backend, decoder, 20, 4), tokens, 16, list(range(13)))
    torch.testing.assert_close(got, logits_of(decoder, tokens), atol=1e-4, rtol=0)
    assert from_hf(to_hf(decoder.config)).activation == "relu"


def test_with_every_neuron_predicted_the_engine_gives_the_dense_tokens(decoder):
    forward = SparseForward(decoder, everything(decoder), num_blocks=32, block_size=4)
    engine = Engine(LocalExecutor(forward), EngineConfig(kv_blocks=32, block_size=4, max_batch_tokens=16))
    prompts = [TOKENS[10 * i : 10 * i + 3 + i].tolist() for i in range(4)]
    requests = [Request(str(i), tuple(prompt), SamplingParams(max_tokens=6, temperature=0.0)) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    wanted = [greedy(decoder, prompt, 6) for prompt in prompts]
    assert min(gap for _, gap in wanted) > 1e-3
    assert [request.output for request in requests] == [tokens for tokens, _ in wanted]
    assert forward.density == 1.0


@pytest.mark.parametrize("share", [None, 0.3])
def test_the_executor_computes_what_masking_the_other_neurons_gives(decoder, predictors, share):
    forward = SparseForward(decoder, predictors, num_blocks=16, block_size=8, share=share)
    window = TOKENS[:60]
    executed = one_by_one(forward, window)
    mask = Predicted(decoder, predictors, share)
    assert executed == pytest.approx(losses(decoder, [window], mask), abs=1e-4)
    mask.close()
    assert 0.05 < forward.density < 0.95


def test_a_recording_is_what_the_layers_did_and_predictors_learn_it(decoder, recording, predictors):
    layer = decoder.layers[1]
    gate, up = layer.mlp.gate_up(layer.post_attention_layernorm(torch.zeros(1, 32)))
    assert recording.sizes[1].shape == (600, gate.shape[1]) == (600, up.shape[1])
    fires = active(recording.sizes[1], None)
    assert active(recording.sizes[1], 0.25).sum(1).eq(round(0.25 * gate.shape[1])).all()
    right = ((predictors[1](recording.inputs[0]) > 0) == fires).float().mean()
    assert right > max(fires.float().mean(), 1 - fires.float().mean()) + 0.1  # better than to say always the same
    with pytest.raises(InputError, match="less than a batch"):
        train_predictors(recording, rank=4, rows=601)


def test_predictors_are_kept_in_a_file_that_fits_one_model(decoder, predictors, tmp_path):
    path = tmp_path / "predictors.safetensors"
    save_predictors(predictors, path)
    again = load_predictors(path, decoder.config)
    x = torch.randn(2, 32)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(predictors, again, strict=True))
    for changes in ({"num_layers": 2}, {"num_layers": 4}, {"intermediate_size": 64}):
        with pytest.raises(InputError, match="train predictors for this model"):
            load_predictors(path, tiny(activation="relu", **changes).config)
    path.write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="train them again"):
        load_predictors(path, decoder.config)


def test_the_batches_of_a_run_on_bytes_are_windows_of_the_text_and_go_on_where_they_were():
    text = torch.arange(200)
    one, two = Bytes(text, 2, 10), Bytes(text, 2, 10)
    (batch,) = next(one)
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.lengths == (10, 10)
    two.load_state_dict(one.state_dict())
    assert torch.equal(next(one)[0].tokens, next(two)[0].tokens)


def test_a_user_gives_a_file_of_predictors_and_what_it_cannot_go_with_is_refused(decoder, tmp_path):
    path = tmp_path / "predictors.safetensors"
    save_predictors(everything(decoder), path)
    sampling, options = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True), {"kv_blocks": 32, "block_size": 4}
    wanted = LLM(loaded(decoder), backend="torch", **options).generate([[5, 6, 7], [9]], sampling)
    sparse = LLM(loaded(decoder), sparsity=str(path), **options)
    assert [answer.tokens for answer in sparse.generate([[5, 6, 7], [9]], sampling)] == [answer.tokens for answer in wanted]
    assert "contextual sparsity" in sparse.engine.executor.forward.name
    for wrong, message in (
        ({"sparsity_share": 0.5}, "says nothing without"),
        ({"sparsity": "p", "offload": "batches=2"}, "leave offload out"),
        ({"sparsity": "p", "quantize": "int8"}, "leave quantize out"),
        ({"sparsity": "p", "speculate": "layers"}, "leave speculate out"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**wrong)
