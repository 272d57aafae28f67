"""What this machine can do at most, measured, and what that bounds a case to in fp32 (the roofline of Williams et al. 2009)."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

from peers.workload import MARK, Case

from armillary.models.config import ModelConfig

GEMM_SHAPES = ((1024, 1024, 1024), (512, 576, 1536), (512, 576, 3072), (512, 1536, 576), (512, 2048, 2048))  # m, k, n


@dataclass(frozen=True)
class Limits:
    gemm: float  # fp32 FLOP/s of the best shape
    gemm_shape: str
    memory_read: float  # bytes/s


def bound(case: Case, config: ModelConfig, limits: Limits) -> float:
    """The most tokens a second of `case` in fp32: arithmetic and memory traffic overlap perfectly, nothing else costs."""
    weights = 4 * config.parameters()
    body = config.parameters() - config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    head = config.vocab_size * config.hidden_size
    kv = config.kv_bytes_per_token()

    def attention(start: int, end: int) -> float:
        """FLOPs of queries at positions start..end-1, each seeing itself and all before it."""
        pairs = (end * (end + 1) - start * (start + 1)) / 2
        return 4 * config.num_layers * config.num_heads * config.head_dim * pairs

    def prefill(prompt: int) -> float:
        return 2 * body * prompt + 2 * head + attention(0, prompt)

    def decode(prompt: int, new: int) -> float:
        return 2 * (body + head) * (new - 1) + attention(prompt, prompt + new - 1)

    pairs = [(len(prompt), new) for prompt, new in zip(case.prompts, case.new, strict=True)]
    if case.kind == "prefill":
        return case.prompt_tokens / max(sum(prefill(prompt) for prompt, _ in pairs) / limits.gemm, weights / limits.memory_read)
    tokens = sum(new - 1 for _, new in pairs)
    flops = sum(decode(prompt, new) for prompt, new in pairs)
    steps = max(new for _, new in pairs) - 1
    read = weights * steps + kv * sum(prompt * (new - 1) + new * (new - 1) / 2 for prompt, new in pairs)
    if case.kind == "decode":
        return tokens / max(flops / limits.gemm, read / limits.memory_read)
    flops += sum(prefill(prompt) for prompt, _ in pairs)
    return sum(case.new) / max(flops / limits.gemm, read / limits.memory_read)


def measure(threads: int) -> Limits:
    """Best of many short runs: a product with weights packed once, and with both operands as they come; and a long read."""
    import torch

    from armillary.cluster import measure as cluster_measure
    from armillary.kernels.packed_linear import LIBRARIES, PackedLinear

    torch.set_num_threads(threads)
    rates = cluster_measure.measure(seconds=2.0)
    found = [(rates.gemm, "1024 x 1024 x 1024, unpacked")]
    for m, k, n in GEMM_SHAPES:
        x, weight = torch.randn(m, k), torch.randn(n, k)
        for library in LIBRARIES:
            product = PackedLinear(weight, library=library)
            fastest, until = float("inf"), time.perf_counter() + 0.5
            while time.perf_counter() < until:
                start = time.perf_counter()
                product(x)
                fastest = min(fastest, time.perf_counter() - start)
            found.append((2 * m * k * n / fastest, f"{m} x {k} x {n}, {product.library}"))
    gemm, shape = max(found)
    return Limits(gemm, shape, rates.memory_read)


if __name__ == "__main__":
    sys.stdout.write(f"\n{MARK}{json.dumps(asdict(measure(int(sys.argv[1]))))}\n")
