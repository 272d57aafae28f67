"""vLLM on the CPU, compiled, fp32, with its prefix cache: time to first token of requests that share a beginning."""

from __future__ import annotations

import sys

from peers.prefix import Prefix, measure
from peers.vllm import use_all_cores


def main(path: str) -> None:
    work = Prefix.load(path)
    use_all_cores(work.threads)
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
