"""Random numbers that belong to something by its name: the same whenever and in whatever order they are asked for."""

from __future__ import annotations

from hashlib import blake2b


def uniform(name: str) -> float:
    """In [0, 1), 53 bits."""
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
