"""Text to token ids and back, for any model: one class over the `tokenizers` library, built from `tokenizer.json` or from GGUF metadata.

Decoding joins the exact bytes of the tokens (`token_bytes`), so that a stream can hold back an incomplete UTF-8 character and still end
up with the same text as `decode` of the whole.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, read_vocabulary
from armillary.models.gguf.vocabulary_writer import vocabulary_metadata

MAX_JSON_BYTES = 256 * 1024 * 1024
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
T = TypeVar("T")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


# For `str.translate`: stand-ins to the character of their byte's number, everything else below 256 to one that Latin-1 lacks.
_TO_LATIN1 = dict.fromkeys(range(256), "\uffff") | {ord(character): chr(byte) for character, byte in _byte_alphabet().items()}


class Tokenizer:
    """`bos` and `eos` are ids or None; `stop_ids` end a generation; `special_ids` are left out by `decode`.

    `chat_template` is the source that came with the tokenizer, if any.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: Sequence[bytes],
        *,
        bos: int | None = None,
        eos: int | None = None,
        stop_ids: Iterable[int] = (),
        special_ids: Iterable[int] = (),
        add_bos: bool = False,
        add_eos: bool = False,
        space_prefix: bool = False,
        byte_level: bool = False,
        chat_template: str | None = None,
        tokens: Sequence[str] = (),
        gguf_keys: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.bos, self.eos = bos, eos
        self.stop_ids = frozenset(stop_ids)
        self.special_ids = frozenset(special_ids)
        self.add_bos, self.add_eos = add_bos, add_eos
        self.chat_template = chat_template
        self._pieces = list(pieces)
        self._tokens = list(tokens)
        self.space_prefix, self.byte_level = space_prefix, byte_level
        self._gguf_keys = gguf_keys
        self._limit: int | None = None
        self._padded = 0
        # Some byte-level vocabularies were trained without the bytes that their corpus lacked (SmolLM2 lacks six control characters).
        single = {piece for piece in self._pieces if len(piece) == 1}
        self.missing_bytes = bytes(byte for byte in range(256) if bytes([byte]) not in single) if byte_level else b""

    # -- text to ids ------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. With `special`, what the model wants around a text (bos, eos) is added unless it is already there.

        Control tokens written in the text (`<|im_end|>`) become their ids, as a chat template needs.
        Raises `InputError` for text that is not valid Unicode (lone surrogates) and for tokens beyond `limit_ids`.
        """
        if not isinstance(text, str):
            raise InputError(f"the text is of type {type(text).__name__}", "give a string")
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
                "send valid UTF-8, or escape the character as a surrogate pair",
            ) from None
        if self.missing_bytes and (lost := len(raw) - len(raw.translate(None, self.missing_bytes))):
            warnings.warn(f"the vocabulary has no token for {lost} bytes of the text, which are left out", stacklevel=2)
        ids: list[int] = _guarded(lambda: self.backend.encode(text, add_special_tokens=False).ids, "encoding")
        if special and self.add_bos and self.bos is not None and (not ids or ids[0] != self.bos):
            ids.insert(0, self.bos)
        if special and self.add_eos and self.eos is not None and ids[-1:] != [self.eos]:
            ids.append(self.eos)
        if self._limit is not None and ids and (highest := max(ids)) >= self._limit:
            raise InputError(
                f"the text contains {self.token_text(highest)!r}, token {highest}; the model knows {self._limit:,} tokens",
                "leave it out: it belongs to a part that this model does not have",
            )
        return ids

    def limit_ids(self, vocabulary: int) -> None:
        """Fits the ids to a model of this vocabulary.

        `encode` refuses tokens that it has no embedding for (Gemma 3's image token in a text model). Ids that only the model
        has (Qwen's embeddings are padded to a round number) can be drawn: they stand for no text, as in `transformers`.
        """
        self._limit = vocabulary if vocabulary < self.vocab_size else None
        self._padded = vocabulary

    # -- ids to text ------------------------------------------------------------------------------------------

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token stands for; a special token's are its written form."""
        if len(self._pieces) <= token < self._padded:
            return b""
        if not 0 <= token < len(self._pieces):
            raise InputError(f"token id {token} is outside the vocabulary of {len(self._pieces):,}", "give ids that this model produced")
        return self._pieces[token]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the tokens; bytes that do not form UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special else frozenset()
        raw = b"".join(self.token_bytes(token) for token in ids if token not in skipped)
        if self.space_prefix and raw.startswith(b" "):
            raw = raw[1:]  # the space that encoding put before the text
        return raw.decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it (`Ġthe`, `▁the`, `<|im_end|>`), for showing to people."""
        self.token_bytes(token)
        return self._tokens[token] if token < len(self._pieces) else f"[PAD{token}]"

    def id_of(self, text: str) -> int | None:
        """The id of a token by its written form in the vocabulary."""
        found: int | None = self.backend.token_to_id(text)
        return found

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def gguf_metadata(self) -> dict[str, Any]:
        """The `tokenizer.*` keys of a GGUF file. Raises `InputError` for a tokenizer that the format would change."""
        if self._gguf_keys is not None:
            return dict(self._gguf_keys)
        return vocabulary_metadata(self)

    # -- where they come from ---------------------------------------------------------------------------------

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer inside a GGUF file."""
        vocabulary = _guarded(lambda: read_vocabulary(file.metadata, file.path.name), file.path.name)
        types = vocabulary.types
        pieces = [
            _piece(token, byte_level=vocabulary.byte_level, added=kind in (CONTROL, UNKNOWN, USER_DEFINED), byte_token=kind == BYTE)
            for token, kind in zip(vocabulary.tokens, types.tolist(), strict=True)
        ]
        template = file.metadata.get("tokenizer.chat_template")
        return cls(
            vocabulary.backend,
            pieces,
            bos=vocabulary.bos,
            eos=vocabulary.eos,
            stop_ids=vocabulary.stop_ids,
            special_ids=[i for i, kind in enumerate(types.tolist()) if kind in (CONTROL, UNKNOWN)],
            add_bos=vocabulary.add_bos,
            add_eos=vocabulary.add_eos,
            space_prefix=vocabulary.space_prefix,
            byte_level=vocabulary.byte_level,
            chat_template=template if isinstance(template, str) else None,
            tokens=vocabulary.tokens,
            gguf_keys={key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")},
        )

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json` or the folder that holds it; the files beside it say what is special and what ends a text."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        return _guarded(lambda: cls._from_json(file), file.name)

    @classmethod
    def _from_json(cls, file: Path) -> Tokenizer:
        raw = _read_json(file)
        if raw is None:
            raise NotFoundError(f"{file} does not exist", "give a tokenizer.json or a model folder that has one")
        backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
        backend.no_truncation()
        backend.no_padding()
        style = _decoder_style(raw, file.name)
        size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max([size, *(index + 1 for index in vocabulary.values())])
        if size > 2 * len(vocabulary) + 1024:
            raise FormatError(f"{file.name}: ids reach {size:,} with {len(vocabulary):,} tokens", "fetch the file again")
        tokens = [""] * size
        for token, index in vocabulary.items():
            tokens[index] = token
        pieces = [
            _piece(
                token, byte_level=style == "bytes", added=index in added, byte_token=style == "spaces" and bool(_BYTE_TOKEN.match(token))
            )
            for index, token in enumerate(tokens)
        ]
        folder = file.parent
        config = _read_json(folder / "tokenizer_config.json") or {}
        generation = _read_json(folder / "generation_config.json") or {}
        model = _read_json(folder / "config.json") or {}
        names = (_read_json(folder / "special_tokens_map.json") or {}) | config

        def id_of(key: str) -> int | None:
            value = names.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            return backend.token_to_id(value) if isinstance(value, str) else None

        bos, eos = id_of("bos_token"), id_of("eos_token")
        stops = set() if eos is None else {eos}
        for source in (model, generation):
            value = source.get("eos_token_id")
            stops |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and 0 <= i < size}
        if eos is None and stops:
            eos = min(stops)
        # The post-processor knows whether a text is opened with bos and closed with eos: ask it.
        around = backend.encode("a", add_special_tokens=True).ids
        return cls(
            backend,
            pieces,
            bos=bos,
            eos=eos,
            stop_ids=stops,
            special_ids=[index for index, token in added.items() if token.special],
            add_bos=bos is not None and around[:1] == [bos],
            add_eos=eos is not None and around[-1:] == [eos],
            space_prefix=style == "spaces" and _prefixes(backend),
            byte_level=style == "bytes",
            chat_template=_template(folder, config),
            tokens=tokens,
        )


def _piece(token: str, *, byte_level: bool, added: bool, byte_token: bool) -> bytes:
    """The bytes behind a vocabulary entry."""
    if byte_token and (match := _BYTE_TOKEN.match(token)):
        return bytes([int(match[1], 16)])
    if added:
        return token.encode("utf-8")
    if byte_level:
        try:
            return token.translate(_TO_LATIN1).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode("utf-8")  # not written in stand-ins: an entry that no text reaches
    return token.replace("▁", " ").encode("utf-8")


def _prefixes(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding puts a space before the text."""
    tokens = backend.encode("a", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith("▁")


def _decoder_style(raw: dict[str, Any], source: str) -> str:
    """'bytes' (byte-level) or 'spaces' (▁ and byte fallback), by the decoder that the file names."""
    decoder = raw.get("decoder") or {}
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    parts = parts if isinstance(parts, list) else []
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    if "ByteLevel" in kinds:
        return "bytes"
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return "spaces"
    raise InputError(f"{source}: decoder {sorted(kinds)} is not supported", "byte-level and SentencePiece-like tokenizers are")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file."""
    try:
        size = path.stat().st_size
    except OSError:
        return None
    if size > MAX_JSON_BYTES:
        raise FormatError(f"{path.name} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read", "check that it is the right file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not JSON ({str(error)[:80]})", "fetch the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} holds a {type(value).__name__}, not an object", "fetch the file again")
    return value


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the string (or the list entry named 'default') in `tokenizer_config.json`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _guarded(build: Callable[[], T], source: str) -> T:
    """Runs what calls into the Rust library, whose faults are bare `Exception`s and, for a panic, a `BaseException`."""
    try:
        return build()
    except (ArmillaryError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise FormatError(f"{source}: the tokenizer's data are inconsistent ({str(error)[:160]})", "fetch the file again") from error
