"""What the replica processes of these tests build: named by "module:function", as `armillary serve` names its own."""

from models import loaded as with_tokenizer
from models import tiny

from armillary.serve.config import EngineConfig
from armillary.serve.llm import build_engine


def tiny_engine(engine, seed=0):
    """A tiny random model's engine, and words for it."""
    return build_engine(with_tokenizer(tiny(seed=seed)), EngineConfig(**engine)), "a tiny random model"
