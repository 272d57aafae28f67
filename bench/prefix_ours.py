"""Armillary's side of the prefix-cache measurement, with the cache or without."""

from __future__ import annotations

import sys

from peers.prefix import Prefix, measure

import armillary
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

VARIANTS = {
    "fp32": {},
    "fp32, no prefix cache": {"prefix_cache": "off"},
    "int4": {"quantize": "int4", "kv_dtype": "fp16"},
    "int4, no prefix cache": {"quantize": "int4", "kv_dtype": "fp16", "prefix_cache": "off"},
}


def main(path: str, variant: str) -> None:
    work = Prefix.load(path)
    llm = LLM(work.gguf_file, threads=work.threads, backend="native", weight_cache="off", **VARIANTS[variant])
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def first_token(prompt: object) -> int:
        return llm.generate([list(prompt)], sampling)[0].tokens[0]

    measure(first_token, work, "armillary", armillary.__version__, variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
