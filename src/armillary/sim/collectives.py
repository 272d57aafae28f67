"""What collectives cost by latency and bandwidth alone (alpha-beta): rings, as bandwidth-optimal libraries run them."""

from __future__ import annotations

from armillary.core.errors import InputError


def terms(name: str, ranks: int) -> tuple[float, float]:
    """(messages in a row, share of the tensor that each rank's link carries) of a ring collective, or of a "send" to one peer.

    Seconds are messages x latency + share x bytes / bandwidth, bytes as `Operation.message_bytes` has them (Thakur et al., IJHPCA 2005;
    Patarasuk and Yuan, JPDC 2009). Raises InputError for an unknown name.
    """
    if name == "send":
        return 1.0, 1.0
    if ranks < 2:
        return 0.0, 0.0
    share = (ranks - 1) / ranks
    match name:
        case "all_reduce":
            return 2.0 * (ranks - 1), 2.0 * share
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return float(ranks - 1), share
    raise InputError(f"no collective is called {name!r}", "use all_reduce, all_gather, reduce_scatter, all_to_all or send")


def seconds(name: str, size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Of one collective of `size` bytes over links of `bandwidth` B/s and `latency` s."""
    messages, share = terms(name, ranks)
    return messages * latency + share * size / bandwidth
