"""vLLM on the CPU, compiled, fp32, on as many cores as the others get."""

from __future__ import annotations

import os
import sys

from peers.workload import Workload, measure, report


def use_all_cores(threads: int) -> None:
    """Before vLLM is imported. By default it keeps a core for itself, which halves it on a small machine."""
    os.environ |= {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GB, as much as our own pool
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process between the caller and the engine
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def main(path: str) -> None:
    workload = Workload.load(path)
    use_all_cores(workload.threads)
    import vllm

    llm = vllm.LLM(
        workload.hf_folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=False,
        enable_prefix_caching=False,  # repeats would be free
        enable_chunked_prefill=True,
        max_model_len=max(2048, workload.longest),
        max_num_seqs=max(64, workload.largest_batch),
        disable_log_stats=True,
    )

    def generate(prompts: object, new: object) -> list[list[int]]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        sampling = [vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for count in new]
        return [list(output.outputs[0].token_ids) for output in llm.generate(requests, sampling, use_tqdm=False)]

    for case in workload.cases:
        report("vllm", vllm.__version__, case, *measure(generate, workload, case), variant="fp32")


if __name__ == "__main__":
    main(sys.argv[1])
