"""llama.cpp through llama-cpp-python's C interface, in each weight format: the bench publishes the best one of a case.

Sequences share one context and are decoded together; prompts enter whole, up to `BATCH` tokens a call.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy
from peers.workload import Case, Workload, measure, report

BATCH = 512  # tokens a call
FORMATS = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,  # repacked on x86: llama.cpp's fastest kernels
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_1": None,  # the file as it is
}


def requantised(workload: Workload, name: str) -> Path:
    """The GGUF file in another format, made once."""
    source, ftype = Path(workload.gguf_file), FORMATS[name]
    if ftype is None:
        return source
    target = Path(workload.scratch) / f"{source.stem}.{name}.gguf"
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = ftype, True, workload.threads
        partial = target.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not write {source} as {name}")
        partial.rename(target)
    return target


class Session:
    """A model with one context for a case: sequence i has seat i, and rows go in by ascending seats. llama.cpp computes only
    consecutive ascending seats together; in any other order each sequence becomes a batch of its own."""

    def __init__(self, model: object, case: Case, threads: int) -> None:
        longest = max(len(prompt) + new for prompt, new in zip(case.prompts, case.new, strict=True))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = case.batch, case.batch * (-(-longest // 256) * 256)
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp refused a context of {params.n_ctx} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, seat, wanted) rows; the greedy next token of each wanted row."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, seat, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = seat, wanted
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        wanted_rows = [index for index, row in enumerate(rows) if row[3]]
        pointers = [llama_cpp.llama_get_logits_ith(self.context, index) for index in wanted_rows]
        return [int(numpy.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax()) for pointer in pointers]

    def generate(self, prompts: object, new: object) -> list[list[int]]:
        prompts, new = list(prompts), list(new)
        llama_cpp.llama_memory_clear(self.memory, True)
        outputs: list[list[int]] = [[] for _ in prompts]
        rows: list[tuple[int, int, int, bool]] = []
        for seat, prompt in enumerate(prompts):
            if len(prompt) > BATCH:
                raise ValueError(f"a prompt has {len(prompt)} tokens, more than the {BATCH} of a call: raise BATCH")
            if len(rows) + len(prompt) > BATCH:
                self._step(rows, outputs)
                rows = []
            rows += [(token, position, seat, position == len(prompt) - 1) for position, token in enumerate(prompt)]
        self._step(rows, outputs)
        while live := [seat for seat, output in enumerate(outputs) if len(output) < new[seat]]:
            self._step([(outputs[seat][-1], len(prompts[seat]) + len(outputs[seat]) - 1, seat, True) for seat in live], outputs)
        return outputs

    def _step(self, rows: list[tuple[int, int, int, bool]], outputs: list[list[int]]) -> None:
        wanted = [row[2] for row in rows if row[3]]
        for seat, token in zip(wanted, self.decode(rows), strict=True):
            outputs[seat].append(token)


def main(path: str) -> None:
    workload = Workload.load(path)
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    models = {}
    for name in FORMATS:
        params = llama_cpp.llama_model_default_params()
        models[name] = llama_cpp.llama_model_load_from_file(str(requantised(workload, name)).encode(), params)
        if not models[name]:
            raise RuntimeError(f"llama.cpp could not load its own {name} file")
    for case in workload.cases:
        if case.kind == "offline":
            continue  # llama.cpp's way to serve many requests is its server: llama_server.py
        for name in FORMATS:
            session = Session(models[name], case, workload.threads)
            speed, tokens = measure(session.generate, workload, case)
            session.close()
            report("llama", llama_cpp.__version__, case, speed, tokens, variant=name)


if __name__ == "__main__":
    main(sys.argv[1])
