"""Armillary's own side of the bench: `LLM.generate`, in this process, with the engine's defaults but for who computes."""

from __future__ import annotations

import sys

from peers.workload import Workload, measure, report

import armillary
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

VARIANTS = {  # options of `serve.config.EngineConfig`
    "fp32": {"backend": "native"},
    "torch fp32": {"backend": "torch"},
    "fp16": {"backend": "native", "quantize": "fp16", "kv_dtype": "fp16"},
    "int8": {"backend": "native", "quantize": "int8", "kv_dtype": "fp16"},
    "int4": {"backend": "native", "quantize": "int4", "kv_dtype": "fp16"},
}


def main(path: str, variant: str) -> None:
    workload = Workload.load(path)
    llm = LLM(
        workload.gguf_file,
        threads=workload.threads,
        max_running=max(64, workload.largest_batch),
        weight_cache="off",
        prefix_cache="off",  # repeats would be free
        **VARIANTS[variant],
    )

    def generate(prompts: object, new: object) -> list[list[int]]:
        sampling = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new]
        return [list(completion.tokens) for completion in llm.generate(list(prompts), sampling)]

    step = getattr(llm.engine.executor.forward, "step", None)  # the plain torch path has none
    weight_bytes = step.model.nbytes if step is not None else None
    for case in workload.cases:
        found = measure(generate, workload, case)
        report("armillary", armillary.__version__, case, *found, variant=variant, weight_bytes=weight_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
