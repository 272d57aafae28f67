"""SmolLM2's vocabulary and a compiler for it, once for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tokenizer():
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (pip install 'armillary[grammar]'): grammars are NOT tested")
    from armillary.models.gguf.reader import GGUFFile
    from armillary.models.hub import resolve
    from armillary.models.tokenizer import Tokenizer

    return Tokenizer.from_gguf(GGUFFile.open(resolve("smollm2")))


@pytest.fixture(scope="session")
def compiler(tokenizer):
    from armillary.serve.grammar.compiler import GrammarCompiler

    return GrammarCompiler(tokenizer, tokenizer.vocab_size)
