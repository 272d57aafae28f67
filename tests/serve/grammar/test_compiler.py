"""Compiled once, kept within bounds, off the loop; matchers that share a grammar do not share a place in it."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_automaton import bits

from armillary.core.errors import ArmillaryError, InputError, MissingDependencyError
from armillary.serve.grammar import grammar as grammars
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.grammar.matcher import SLOW_MASKS
from armillary.serve.grammar.repeats import check_repeats, check_rules

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}


def test_errors_say_what_is_wrong_and_where(compiler):
    for grammar, words in [
        (grammars.regex("(a", field="guided_regex"), "position 3"),
        (grammars.regex("(?=a)b"), "Lookahead"),
        (grammars.ebnf('root ::= "a" b'), 'Rule "b" is not defined'),
        (grammars.ebnf("root ::= root"), "no text follows"),
        (grammars.ebnf("\N{GRINNING FACE}"), "Unexpected character"),
        (grammars.json_schema({"$ref": "#"}, field="response_format.json_schema.schema"), "no text follows"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            compiler.compile(grammar)
        assert caught.value.field == grammar.field
        assert "/cpp/" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammars.regex(""),
        lambda: grammars.regex("a" * 5000),
        lambda: grammars.regex("a\0"),
        lambda: grammars.regex("\ud800"),
        lambda: grammars.regex("(a{1,100}){1,100}"),
        lambda: grammars.regex('"(a{1,100}){1,100}"'),
        lambda: grammars.regex("a{1,100000}"),
        lambda: grammars.ebnf("#" * 70_000),
        lambda: grammars.choice([]),
        lambda: grammars.choice(["a", ""]),
        lambda: grammars.json_schema("{"),
        lambda: grammars.json_schema("[1]"),
    ],
)
def test_bounds_hold_before_anything_is_compiled(make):
    with pytest.raises(InputError):
        make()


def test_counts_that_are_fine():
    for pattern in (r"(ab{2,3}){4}", r"\{1,100\}{60}", "[{1,90}]{50}", "(a|b){100}c{100}", "((a*)+)?", "x{3}"):
        check_repeats(pattern, "regex")
    check_rules('root ::= "((a{1,100}){1,100})" | [a-z]{3} # (a{9}){99}\nb ::= [0-9]{40} root{1,9}\nc ::= c [a-z]{70}', "grammar")


@pytest.mark.parametrize(
    "rules",
    ['root ::= a{1,64}\na ::= b{1,64}\nb ::= "a"{1,64}', 'root ::= "a" | (root "b"){2}', 'root ::= a{600}\na ::= "x" (b){2}\nb ::= "y"'],
)
def test_counts_through_the_names_of_rules_are_counted(rules):
    with pytest.raises(InputError, match="repetitions within"):
        check_rules(rules, "grammar")


def test_the_same_grammar_is_compiled_once_and_the_cache_is_bounded(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, cache_bytes=400_000)

    async def several():
        return await asyncio.gather(*(compiler.compiled(grammars.json_schema(PERSON, field=f"f{i}", spaces=None)) for i in range(4)))

    first, *others = asyncio.run(several())
    assert all(one is first for one in others)
    assert compiler.compile(grammars.json_schema(PERSON, spaces=None)) is first
    for name in "abcd":
        compiler.compile(grammars.json_schema({"type": "object", "properties": {name: {"type": "string"}}}, spaces=1))
        assert 0 < compiler.cached_bytes <= 400_000
    assert compiler.compile(grammars.json_schema(PERSON, spaces=None)) is not first


def test_a_grammar_that_takes_too_long_is_refused_and_the_loop_goes_on(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, seconds=0.0)
    with pytest.raises(InputError, match="within 0 s"):
        asyncio.run(compiler.compiled(grammars.regex("[a-z]{1,500}")))


def test_without_xgrammar_the_error_names_the_fix(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'armillary\[grammar\]'"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(grammars.regex("a"))


def test_choices_of_any_text(tokenizer, compiler):
    choices = ["yes", "no", 'a "b"\n\\', "é👋", " [x]{2}"]
    for text in choices:
        matcher = compiler.compile(grammars.choice(choices)).matcher()
        for token in tokenizer.encode(text, special=False):
            matcher.accept(token)
        assert matcher.complete


def test_the_first_bytes_of_a_character_may_be_forced(compiler):
    for choices, forced in ((["да", "нет"], b"\xd0"), (["é", "è"], b"\xc3"), (["ja😀", "ja😃"], "ja😀".encode()[:-1])):
        assert compiler.compile(grammars.choice(choices)).matcher().forced() == forced


def test_a_matcher_of_ones_own(tokenizer, compiler):
    compiled = compiler.compile(grammars.regex("(ab|cd)+"))
    one, other = compiled.matcher(), compiled.matcher()
    (a,), (c,) = tokenizer.encode("a", special=False), tokenizer.encode("c", special=False)
    one.accept(a)
    other.accept(c)
    fork = one.fork()
    assert (one.forced(), other.forced(), fork.forced()) == (b"b", b"d", b"b")
    fork.accept(tokenizer.encode("b", special=False)[0])
    assert (one.forced(), fork.complete, one.complete) == (b"b", True, False)
    with pytest.raises(ArmillaryError, match="does not follow"):
        one.accept(c)


TEXT = '{"name": "Ann \\"A\\" Lee é", "age": 31}'


@settings(max_examples=40)
@given(st.data())
def test_masks_after_drafts_are_the_masks_after_tokens_and_leave_no_trace(tokenizer, compiler, data):
    """The rollback law: looking ahead along any drafts changes nothing."""
    compiled = compiler.compile(grammars.json_schema(PERSON))
    tokens = [*tokenizer.encode(TEXT, special=False), tokenizer.eos]
    begun = data.draw(st.integers(0, len(tokens) - 1))
    right = data.draw(st.integers(0, len(tokens) - begun))
    wrong = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size), max_size=2))
    drafts = [*tokens[begun : begun + right], *wrong]
    matcher = compiled.matcher()
    for token in tokens[:begun]:
        matcher.accept(token)
    before = matcher.mask()
    ahead = matcher.mask(drafts)
    assert ahead.shape == (1 + len(drafts), -(-tokenizer.vocab_size // 32))
    assert (matcher.mask() == before).all()
    for row in range(right + 1):
        if matcher.finished:
            break
        assert (ahead[row] == matcher.mask()[0]).all()
        if row < right:
            matcher.accept(drafts[row])


def test_the_end_is_allowed_only_where_the_grammar_is_complete(tokenizer, compiler):
    matcher = compiler.compile(grammars.regex("ab?")).matcher()
    ends = []
    for text in ("", "a", "b"):
        for token in tokenizer.encode(text, special=False):
            matcher.accept(token)
        allowed = bits(matcher.mask().numpy()[0], tokenizer.vocab_size)
        ends.append((allowed[tokenizer.eos], matcher.complete, matcher.finished))
    # "ab" can only end: the answer is finished without drawing the token that says so.
    assert ends == [(False, False, False), (True, True, False), (True, True, True)]
    assert np.flatnonzero(allowed).tolist() == sorted(tokenizer.stop_ids)


def test_special_tokens_stand_for_no_text(tokenizer, compiler):
    matcher = compiler.compile(grammars.regex(r"<\|im_start\|>.*")).matcher()
    allowed = bits(matcher.mask().numpy()[0], tokenizer.vocab_size)
    assert not allowed[sorted(tokenizer.special_ids)].any()
    assert allowed.any()


def test_a_grammar_that_is_slow_to_follow_is_refused_or_ends_its_walk(compiler, monkeypatch):
    grammar = grammars.ebnf("root ::= [a-z]*", field="guided_grammar")
    walk = compiler.compile(grammar).matcher()
    monkeypatch.setattr("armillary.serve.grammar.matcher.MASK_SECONDS", -1.0)  # however fast it is
    for _ in range(SLOW_MASKS):
        assert not walk.slow
        walk.mask()
    for one in (walk, walk.fork()):
        with pytest.raises(InputError, match="many ways") as caught:
            one.accept(0)
        assert caught.value.field == "guided_grammar"
    with pytest.raises(InputError, match="many ways"):
        compiler.compile(grammars.ebnf("root ::= [b-z]*"))
