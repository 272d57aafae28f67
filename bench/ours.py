"""Armillary's own side of the bench: `LLM.generate`, in this process, with the engine's defaults."""

from __future__ import annotations

import sys

from peers.workload import Workload, measure, report

import armillary
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams


def main(path: str) -> None:
    workload = Workload.load(path)
    llm = LLM(workload.gguf_file, threads=workload.threads, max_running=max(64, workload.largest_batch))

    def generate(prompts: object, new: object) -> list[list[int]]:
        sampling = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new]
        return [list(completion.tokens) for completion in llm.generate(list(prompts), sampling)]

    library = getattr(llm.engine.executor, "library", "")
    for case in workload.cases:
        report("armillary", armillary.__version__, case, *measure(generate, workload, case), variant=f"fp32, {library}".rstrip(", "))


if __name__ == "__main__":
    main(sys.argv[1])
