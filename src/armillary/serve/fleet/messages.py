"""Requests, tokens and errors as plain values, for processes that share nothing: JSON, never pickle."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from armillary.core.errors import ArmillaryError, CapacityError, FormatError, InputError, NotFoundError
from armillary.serve.request import Request, SamplingParams, TokenLogprob

Message = dict[str, Any]

_ERRORS: Final = {kind.__name__: kind for kind in (ArmillaryError, CapacityError, FormatError, InputError, NotFoundError)}
_TUPLES: Final = ("stop", "stop_token_ids")


def pack_request(request: Request, now: int) -> Message:
    """What a replica needs to go on with `request` where its output ends. Its text is made by whoever holds the stream.

    Instants are sent as durations from `now` (ns), for clocks of two machines have nothing to do with each other.
    """
    sampling = {field.name: getattr(request.sampling, field.name) for field in fields(SamplingParams)}
    if request.output:  # the prompt's scores were sent with the first token
        sampling["prompt_logprobs"] = None
    return {
        "id": request.id,
        "prompt": list(request.prompt),
        "output": list(request.output),
        "sampling": {**sampling, "stop": []},  # found in the text, which is not the replica's
        "priority": request.priority,
        "age": now - (request.arrival if request.arrival is not None else now),
        "due": None if request.deadline is None else request.deadline - now,
        "cache_salt": request.cache_salt,
        "adapter": request.adapter,
        "grammar": None if request.constraint is None else _grammar(request),
    }


def _grammar(request: Request) -> Message:
    """Raises InputError for a constraint that is not known as a grammar."""
    grammar = getattr(request.constraint, "grammar", None)
    if grammar is None:
        raise InputError(f"the constraint of request '{request.id}' cannot be sent to a replica", "give a grammar", field="constraint")
    return {"kind": grammar.kind, "source": grammar.source, "spaces": grammar.spaces, "field": grammar.field}


def unpack_request(message: Message, now: int) -> Request:
    """`now`: by the clock of this side. The grammar is its reader's to compile.

    Raises FormatError for what is no request: the other end is a process of ours, but may be of another version.
    """
    try:
        sampling = dict(message["sampling"])
        for name in _TUPLES:
            sampling[name] = tuple(sampling[name])
        sampling["logit_bias"] = tuple((int(token), float(bias)) for token, bias in sampling["logit_bias"])
        request = Request(
            id=str(message["id"]),
            prompt=tuple(map(int, message["prompt"])),
            sampling=SamplingParams(**sampling),
            arrival=now - int(message["age"]),
            priority=int(message["priority"]),
            deadline=None if message["due"] is None else now + int(message["due"]),
            cache_salt=str(message["cache_salt"]),
            adapter=str(message["adapter"]),
        )
        request.output.extend(map(int, message["output"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"a request between processes is damaged: {error!r}", "run one version of Armillary everywhere") from error
    return request


def pack_token(sampled: TokenLogprob) -> list[Any]:
    """[token], or [token, logprob, [[token, logprob], ...]] when it has one."""
    return [sampled.token] if sampled.logprob is None else [sampled.token, sampled.logprob, sampled.top]


def unpack_token(values: list[Any]) -> TokenLogprob:
    token, logprob, top = (*values, None, None)[:3]
    return TokenLogprob(int(token), logprob, tuple((int(other), score) for other, score in top or ()))


def pack_error(error: Exception) -> Message:
    if isinstance(error, ArmillaryError):
        return {"kind": type(error).__name__, "problem": error.problem[:2000], "fix": error.fix[:2000], "field": error.field}
    return {"kind": type(error).__name__, "problem": f"{type(error).__name__}: {error}"[:2000], "fix": "", "field": None}


def unpack_error(message: Message) -> ArmillaryError:
    """The same kind of error where it is one of `core.errors`; otherwise a plain one that says what it was."""
    kind = _ERRORS.get(message["kind"], ArmillaryError)
    return kind(str(message["problem"]), str(message["fix"]), field=message["field"])
