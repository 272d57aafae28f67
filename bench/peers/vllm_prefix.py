"""vLLM on the CPU, compiled, fp32, with its prefix cache: time to first token of requests that share a beginning."""

from __future__ import annotations

import os
import sys

from peers.prefix import Prefix, measure


def main(path: str) -> None:
    work = Prefix.load(path)
    os.environ |= {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{work.threads - 1}" if work.threads > 1 else "0",
        "OMP_NUM_THREADS": str(work.threads),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    llm = vllm.LLM(
        work.hf_folder, skip_tokenizer_init=True, dtype="float32", enable_prefix_caching=True, max_model_len=2048, disable_log_stats=True
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)

    def first_token(prompt: object) -> int:
        return int(llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)[0].outputs[0].token_ids[0])

    measure(first_token, work, "vllm", vllm.__version__, "fp32")


if __name__ == "__main__":
    main(sys.argv[1])
