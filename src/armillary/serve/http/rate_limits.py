"""How much each key may ask for a minute: POST requests at the door, tokens when they are known, and the headers that tell of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armillary.core.units import S
from armillary.serve.http.errors import as_api_error
from armillary.serve.http.exchange import current
from armillary.serve.operations.keys import ApiKey, KeyRing
from armillary.serve.operations.refusal import Refused
from armillary.serve.operations.token_bucket import TokenBucket
from armillary.serve.request import Event, Request


@dataclass(frozen=True, slots=True)
class Account:
    """A key's buckets; None where it has no limit."""

    name: str
    requests: TokenBucket | None
    tokens: TokenBucket | None

    @classmethod
    def of(cls, key: ApiKey, now: int) -> Account:
        def bucket(per_minute: int | None) -> TokenBucket | None:
            return TokenBucket(per_minute, now) if per_minute is not None else None

        return cls(key.name, bucket(key.requests_per_minute), bucket(key.tokens_per_minute))

    def headers(self, now: int) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI has them: the limit, what remains of it, and how long until nothing is missing."""
        said = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                said[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                said[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level(now))))
                said[f"x-ratelimit-reset-{kind}"] = f"{bucket.full_in(now) / S:.3f}s"
        return said


class RateLimits:
    """All keys' accounts. `admit` is a service's gate, and it observes the requests: answers are charged as they are written.

    A prompt is charged when it is taken, so it has to be affordable; its answer may leave a debt, which the key's next
    requests wait for.
    """

    def __init__(self, ring: KeyRing) -> None:
        now = time.perf_counter_ns()
        limited = (key for key in ring.keys if key.requests_per_minute is not None or key.tokens_per_minute is not None)
        self.accounts = {key.name: Account.of(key, now) for key in limited}
        self._charged: dict[Request, TokenBucket] = {}

    def account(self) -> Account | None:
        """Of the key that the running exchange came with."""
        exchange = current()
        return self.accounts.get(exchange.key) if exchange is not None and exchange.key is not None else None

    def admit(self, requests: Sequence[Request]) -> None:
        """Charge the prompts of `requests`; raises Refused when the key has too few tokens left."""
        self.admit_tokens(sum(len(request.prompt) for request in requests))

    def admit_tokens(self, tokens: int) -> None:
        account = self.account()
        if account is None or account.tokens is None:
            return
        now, bucket = time.perf_counter_ns(), account.tokens
        wait = bucket.take(min(tokens, bucket.per_minute), now)
        if wait:
            raise _refused(account.name, "tokens", bucket, now, f"the prompt has {tokens:,}", wait)
        bucket.charge(max(0, tokens - bucket.per_minute), now)

    def submitted(self, request: Request) -> None:
        account = self.account()
        if account is not None and account.tokens is not None:
            self._charged[request] = account.tokens

    def event(self, request: Request, event: Event) -> None:
        bucket = self._charged.get(request)
        if bucket is not None and event.token is not None:
            bucket.charge(1, time.perf_counter_ns())
        if event.finish_reason is not None:
            self._charged.pop(request, None)


class RateGuard:
    """Takes a POST request from its key's account before anything of it is read, and tells how the account stands with every answer."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._limits.account() if scope["type"] == "http" else None
        if account is None:
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers(time.perf_counter_ns()))
            await send(message)

        if scope["method"] == "POST" and account.requests is not None:
            now = time.perf_counter_ns()
            wait = account.requests.take(1, now)
            if wait:
                error = as_api_error(_refused(account.name, "requests", account.requests, now, "this is one more", wait))
                await error.response(scope["path"])(scope, receive, told)
                return
        await self._app(scope, receive, told)


def _refused(name: str, kind: str, bucket: TokenBucket, now: int, wanted: str, wait: int) -> Refused:
    left = bucket.level(now)
    state = f"{int(left):,} are left" if left >= 0 else f"{int(-left):,} are owed for answers"
    return Refused(
        f"key {name!r} may use {bucket.per_minute:,} {kind} a minute, {state} and {wanted}",
        f"retry in {wait / S:.1f} s, or have the key's {kind}_per_minute raised",
        code="rate_limit_exceeded",
        retry_after=wait / S,
    )
