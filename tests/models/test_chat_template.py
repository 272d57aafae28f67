"""Chat templates render as transformers renders them, and cannot harm who loads them."""

import threading
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from armillary.core.errors import InputError
from armillary.models import template_sandbox
from armillary.models.chat_template import ChatTemplate
from armillary.models.load import LoadedModel
from armillary.models.tokenizer import Tokenizer

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "a"]
BACKEND = tokenizers.Tokenizer(models.BPE(dict(zip(TOKENS, range(6), strict=True)), []))
BACKEND.add_special_tokens(TOKENS[:5])
TOKENIZER = Tokenizer(BACKEND, [token.encode() for token in TOKENS], bos=0, eos=1, stop_ids=[1], special_ids=range(5), tokens=TOKENS)

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{ content }}
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""
TOOLS = """{%- macro listed(values) %}{% for v in values %}{{ v | tojson(indent=2) }}{% if not loop.last %}, {% endif %}{% endfor %}{% endmacro %}
{%- set ns = namespace(count=0, text='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.text = ns.text ~ loop.index ~ '/' ~ loop.length ~ m.content.split(' ')[0].upper() ~ ('%s;' % m.role) %}
    {%- if ns.count >= 3 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.text }}|{{ messages[::-1] | map(attribute='role') | join(',') }}|{{ 'x'.replace('x', 'y') * 3 }}
{%- if tools %}{{ listed(tools) }}{% endif %}
{%- generation %}{{ messages[-1]['content'] | trim | default('none') }}{% endgeneration %}
{{- {'a': 'é<&>'} | tojson }}{{ strftime_now('%Y')[:2] }}{{ 2 ** 3 }}{{ '{:>4}'.format(7) }}{{ 'ab' | center(6) }}"""
CONVERSATIONS = [
    [{"role": "user", "content": "hi there"}],
    [{"role": "user", "content": " é "}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "{{ c }} <|im_end|>"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(template: str, conversation: list[dict[str, str]], prompt: bool) -> None:
    peer = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<s>", eos_token="</s>")
    tools = [{"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {}}}]

    def outcome(render: Any) -> str:
        try:
            return render()
        except Exception as error:
            return "refused" if "must alternate" in str(error) else repr(error)

    ours = outcome(lambda: ChatTemplate(template, TOKENIZER).render(conversation, prompt, tools))
    theirs = outcome(
        lambda: peer.apply_chat_template(conversation, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=prompt)
    )
    assert ours == theirs


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in ChatTemplate(CHATML, TOKENIZER).render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([], "messages", "no message"),
        ([{"content": "x"}], "messages[0].role", "message 0 has no role"),
        (["x"], "messages[0].role", "message 0 has no role"),
        ([{"role": "user", "content": 5}], "messages[0].content", "type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "'image_url'"),
        ([{"role": "user", "content": None}], "messages", "fails on these messages"),
        ([{"role": "user"}], "messages", "chat template"),
    ],
)
def test_bad_messages_are_named(messages: Any, field: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ChatTemplate(CHATML, TOKENIZER).render(messages)
    assert caught.value.field == field


def test_the_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(InputError, match="Conversation roles must alternate"):
        ChatTemplate(MISTRAL, TOKENIZER).render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ ", "{% nosuchtag %}", "{{ 1 | nosuchfilter }}", "(" * 10, "{{ " + "(" * 50_000 + " }}", "x" * 1_000_001]
)
def test_what_is_not_a_template_is_refused(source: str) -> None:
    if source == "(" * 10:  # text without tags is a template
        assert ChatTemplate(source, TOKENIZER).render(CONVERSATIONS[0]) == source
        return
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(source, TOKENIZER)


HOSTILE = {
    "python": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "environment": "{{ self.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "repeat": "{{ 'x' * 10**9 }}",
    "repeat a list": "{{ [0] * 10**12 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "format": "{{ '%999999999d' % 1 }}",
    "star format": "{{ '%*d' % (10**9, 1) }}",
    "format method": "{{ '{:>999999999}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10**9) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ 'x\ny' | indent(10**9) }}",
    "json": "{{ [1] | tojson(indent=10**9) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling with +": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "replace": "{% set t = 'x' * 10**6 %}{{ t | replace('x', t) }}",
    "replace method": "{% set t = 'x' * 10**6 %}{{ t.replace('', t) }}",
    "join": "{% set t = 'x' * 10**6 %}{{ t | join(t) }}",
    "join method": "{% set t = 'x' * 10**6 %}{{ t.join(t) }}",
    "range": "{{ range(10**9) | list }}",
    "output": "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    "loops": "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% for i in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(40) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.3)
    try:
        out = ChatTemplate(HOSTILE[name], TOKENIZER).render(CONVERSATIONS[0])
    except InputError:
        return
    assert name in ("python", "globals")
    assert out == ""  # the sandbox turns what is unsafe to read into an undefined value


def test_threads_have_their_own_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(CHATML, TOKENIZER)
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 60.0)
    expected, got = template.render(CONVERSATIONS[1]), []
    threads = [threading.Thread(target=lambda: got.extend(template.render(CONVERSATIONS[1]) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 200


@pytest.mark.parametrize(
    ("template", "token"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>"), ("{{ messages[0].content }}", None)]
)
def test_the_end_of_a_turn_is_found(template: str, token: str | None) -> None:
    found = ChatTemplate(template, TOKENIZER).end_of_turn()
    assert (None if found is None else TOKENS[found]) == token


@pytest.mark.slow
def test_smollm2_renders_its_system_prompt_once(smollm2: LoadedModel) -> None:
    assert smollm2.chat_template is not None
    text = smollm2.chat_template.render([{"role": "user", "content": "hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.tokenizer.encode(text, special=False)
    assert smollm2.tokenizer.decode(ids, skip_special=False) == text
    assert smollm2.chat_template.end_of_turn() == smollm2.tokenizer.eos
