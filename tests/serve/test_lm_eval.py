"""The harness's own numbers from our engine: equal to a plain pass in float64, and a local task run through `lm_eval` end to end."""

import copy
import json

import pytest
import torch
from models import loaded, tiny

from armillary.kernels.attention import CausalAttend

pytest.importorskip("lm_eval", reason="the harness: pip install 'armillary[eval]'")
from lm_eval.api.instance import Instance

from armillary.core.errors import InputError
from armillary.serve.lm_eval import ArmillaryLM


@pytest.fixture
def model():
    return ArmillaryLM(loaded(tiny()), backend="torch", kv_memory=8_000_000)


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def plain(model, context, continuation):
    """(sum of log-probabilities, all likeliest) in float64, in one pass."""
    decoder = copy.deepcopy(model.llm.loaded.decoder).double()
    ids = torch.tensor([*context, *continuation])
    with torch.no_grad():
        table = decoder(ids, torch.arange(len(ids)), CausalAttend([len(ids)])).log_softmax(-1)[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    return table.gather(1, targets[:, None]).sum().item(), bool((table.argmax(-1) == targets).all())


def test_loglikelihoods_are_those_of_a_plain_pass(model):
    pairs = [("ONE TWO ", "THREE"), ("A", "B"), ("X Y", " Z! "), ("", "WORD")]  # the tokenizer knows no small letters
    made = model.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    encode = model.llm.loaded.tokenizer.encode
    for (total, greedy), (context, continuation) in zip(made, pairs, strict=True):
        moved = context[len(context.rstrip()) :] + continuation  # trailing spaces belong to the continuation
        start = encode(context.rstrip()) or [model.prefix_token_id]
        expected = plain(model, start, encode(moved))
        assert (total, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_the_likeliest_continuation_is_told(model):
    start = model.llm.loaded.tokenizer.encode("HELLO")
    best = model.generate_until([instance("generate_until", "HELLO", {"until": [], "max_gen_toks": 6})])[0]
    ((total, greedy),) = model._loglikelihood_tokens([(None, start, model.llm.loaded.tokenizer.encode(best))])
    assert greedy
    assert total < 0


def test_rolling_windows_score_every_token_once(model):
    text = "".join(chr(33 + i % 60) for i in range(300))  # longer than the context of 256
    (total,) = model.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    ids = model.llm.loaded.tokenizer.encode(text)
    # lm_eval's windows: 255 tokens after the prefix, then the rest with all the context that fits before it.
    first = plain(model, [model.prefix_token_id], ids[:255])[0]
    second = plain(model, ids[44:255], ids[255:])[0]
    assert total == pytest.approx(first + second, abs=1e-3)


def test_generation_stops_where_it_is_told_and_refuses_what_it_does_not_know(model):
    prompts = [chr(letter) for letter in range(65, 91)]

    def generate(until):
        return model.generate_until([instance("generate_until", prompt, {"until": until, "max_gen_toks": 20}) for prompt in prompts])

    free = generate([])
    stop = max(free, key=len)[5]
    assert generate([stop]) == [text.partition(stop)[0] for text in free]
    assert any(stop in text for text in free)
    with pytest.raises(InputError, match="'top_k' is not supported"):
        model.generate_until([instance("generate_until", "ABC", {"until": [], "top_k": 3})])


def test_what_does_not_fit_is_an_error_not_a_cut(model):
    with pytest.raises(InputError, match="exceed 256"):
        model._loglikelihood_tokens([(None, [1] * 250, [2] * 7)])


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_that_the_scores_say(model, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"Q{i} IS", "choices": [" YES", " NO", " MAYBE SO"], "answer": i % 3} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    found = lm_eval.simple_evaluate(
        model=model, tasks=["local_choice"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
    )["results"]["local_choice"]
    encode = model.llm.loaded.tokenizer.encode
    right = normed = 0
    for row in rows:
        scores = [plain(model, encode(row["question"]), encode(choice))[0] for choice in row["choices"]]
        right += max(range(3), key=scores.__getitem__) == row["answer"]
        per_byte = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        normed += max(range(3), key=per_byte.__getitem__) == row["answer"]
    assert found["acc,none"] == right / 6
    assert found["acc_norm,none"] == normed / 6
