"""Grammars compiled for one model's vocabulary by xgrammar: off the event loop, one at a time, bounded in time, kept while they are used."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError, CapacityError, InputError, MissingDependencyError
from armillary.serve.grammar.grammar import Grammar
from armillary.serve.grammar.matcher import Matcher, slow

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

CACHE_BYTES = 128 * 1024 * 1024
MAX_WAITING = 64  # grammars that are being compiled or wait for it
TRIED = 16  # tokens of a walk through a new grammar
COMPILE_SECONDS = 20.0  # how long a request waits for its grammar
_WHERE = re.compile(r"\A\[[\d:]+\] \S+: (?:Check failed: .*? is false: )?")


class Compiled:
    """A grammar ready to be followed, by any number of matchers at once."""

    def __init__(self, handle: Any, grammar: Grammar, vocab_size: int, stops: Tensor) -> None:
        self.grammar = grammar
        self.bytes: int = handle.memory_size_bytes + len(grammar.source)
        self._handle = handle
        self._vocab_size = vocab_size
        self._stops = stops

    def matcher(self) -> Matcher:
        """A new walk from the beginning: one for each sequence."""
        return Matcher(library().GrammarMatcher(self._handle), self._vocab_size, self._stops, self.grammar)


class GrammarCompiler:
    """Compiles for `vocab_size` logits, token ids of `tokenizer`. What has been compiled is kept, least recently used goes first.

    `compile` blocks, `compiled` waits on the event loop; both may be called from any thread, and the same grammar asked for
    several times is compiled once.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, cache_bytes: int = CACHE_BYTES, seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stops = _bits(tokenizer.stop_ids, vocab_size)
        self._cache_bytes = cache_bytes
        self._seconds = seconds
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, int | None], Compiled] = OrderedDict()
        self._coming: dict[tuple[str, str, int | None], Future[Compiled]] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._backend: Any = None

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(one.bytes for one in self._kept.values())

    def compile(self, grammar: Grammar) -> Compiled:
        """Raises InputError for a grammar that is wrong or too hard, MissingDependencyError without xgrammar, CapacityError when too many wait."""
        try:
            return self._submit(grammar).result(self._seconds)
        except WaitTimeout:
            raise self._late(grammar) from None
        except InputError as error:
            raise _placed(error, grammar) from None

    async def compiled(self, grammar: Grammar) -> Compiled:
        """The same for the event loop, which goes on meanwhile."""
        with self._lock:
            found = self._look(grammar)
        if found is not None:
            return found
        try:
            # Shielded: another request may wait for the same.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._submit(grammar))), self._seconds)
        except TimeoutError:
            raise self._late(grammar) from None
        except InputError as error:
            raise _placed(error, grammar) from None

    def _look(self, grammar: Grammar) -> Compiled | None:
        found = self._kept.get(grammar.key)
        if found is not None:
            self._kept.move_to_end(grammar.key)
        return found

    def _submit(self, grammar: Grammar) -> Future[Compiled]:
        with self._lock:
            found = self._look(grammar)
            if found is not None:
                done: Future[Compiled] = Future()
                done.set_result(found)
                return done
            coming = self._coming.get(grammar.key)
            if coming is None:
                if len(self._coming) >= MAX_WAITING:
                    raise CapacityError(f"{MAX_WAITING} grammars wait to be compiled", "come back in a second", field=grammar.field)
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="armillary-grammar")
                coming = self._coming[grammar.key] = self._worker.submit(self._build, grammar)
        coming.add_done_callback(lambda done: self._arrived(grammar, done))  # at once when it is done, and never under the lock
        return coming

    def _arrived(self, grammar: Grammar, done: Future[Compiled]) -> None:
        with self._lock:
            if self._coming.get(grammar.key) is not done:  # told of it before, by another who waits
                return
            del self._coming[grammar.key]
            if done.cancelled() or done.exception() is not None:
                return
            compiled = done.result()
            if compiled.bytes > self._cache_bytes:
                return
            self._kept[grammar.key] = compiled
            while sum(one.bytes for one in self._kept.values()) > self._cache_bytes:
                self._kept.popitem(last=False)

    def _build(self, grammar: Grammar) -> Compiled:
        backend = self._compiler()
        try:
            handle = {"json_schema": _json_schema, "regex": _regex, "ebnf": _ebnf, "structural_tag": _structural_tag}[grammar.kind](
                backend, grammar
            )
            compiled = Compiled(handle, grammar, self._vocab_size, self._stops)
            first = compiled.matcher().mask(())
        except ArmillaryError:
            raise
        except (RuntimeError, UnicodeDecodeError) as error:  # its own words, which may end within a character
            said = error.object.decode("utf-8", "replace") if isinstance(error, UnicodeDecodeError) else str(error)
            words = (_WHERE.sub("", said).strip().splitlines() or ["it cannot be compiled"])[0]
            raise InputError(words[:300], "correct it", field=grammar.field) from None
        if not bool(first.any()):
            raise InputError("no text follows this grammar", "look for a rule that only leads to itself", field=grammar.field)
        self._try_out(compiled)
        return compiled

    def _try_out(self, compiled: Compiled) -> None:
        """Walk a little way, on this thread, where nobody's iteration waits for it. Raises InputError for what is too slow to follow."""
        walk = compiled.matcher()
        for step in range(TRIED):
            bits = np.unpackbits((walk.mask()[0] & ~self._stops).numpy().view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[: self._vocab_size])
            if walk.slow:
                raise slow(compiled.grammar)
            if not len(allowed):
                return
            walk.accept(int(allowed[step * 7919 % len(allowed)]))

    def _compiler(self) -> Any:
        """xgrammar with this vocabulary; special tokens stand for no text, so no grammar can ask for them."""
        if self._backend is None:
            xgrammar, tokenizer = library(), self._tokenizer
            pieces = [
                b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
                for token in range(min(self._vocab_size, max(tokenizer.vocab_size, 1)))
            ]
            info = xgrammar.TokenizerInfo(
                pieces,
                xgrammar.VocabType.RAW,
                vocab_size=self._vocab_size,
                stop_token_ids=sorted(tokenizer.stop_ids),
                add_prefix_space=tokenizer.space_prefix,
            )
            self._backend = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        return self._backend

    def _late(self, grammar: Grammar) -> InputError:
        return InputError(f"it was not compiled within {self._seconds:g} s", "make it simpler", field=grammar.field)


def library() -> ModuleType:
    """xgrammar, imported when the first grammar needs it: it brings `transformers` along."""
    try:
        import xgrammar
    except ImportError as error:
        raise MissingDependencyError(
            f"answers that follow a grammar need xgrammar ({error})", "pip install 'armillary[grammar]' where the server runs"
        ) from error
    return xgrammar


def _bits(tokens: Iterable[int], vocab_size: int) -> Tensor:
    words = [0] * -(-vocab_size // 32)
    for token in tokens:
        words[token // 32] |= 1 << token % 32
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def _placed(error: InputError, grammar: Grammar) -> InputError:
    """The error with the place of this request's grammar, which may have been compiled for another's."""
    return InputError(f"{grammar.field}: {error.problem}", error.fix, field=grammar.field)


def _json_schema(backend: Any, grammar: Grammar) -> Any:
    if grammar.spaces is None:
        return backend.compile_json_schema(grammar.source, any_whitespace=False)
    return backend.compile_json_schema(grammar.source, max_whitespace_cnt=grammar.spaces)


def _regex(backend: Any, grammar: Grammar) -> Any:
    return backend.compile_regex(grammar.source)


def _ebnf(backend: Any, grammar: Grammar) -> Any:
    return backend.compile_grammar(grammar.source)


def _structural_tag(backend: Any, grammar: Grammar) -> Any:
    return backend.compile_structural_tag(grammar.source)
