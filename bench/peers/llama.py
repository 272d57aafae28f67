"""llama.cpp through llama-cpp-python's C interface, in each weight format: the bench publishes the best one of a case.

Sequences share one context and are decoded together; prompts enter whole, up to `BATCH` tokens a call, when a seat is free.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from pathlib import Path

import llama_cpp
import numpy
from peers.workload import Case, Workload, measure, report

BATCH = 512  # tokens a call
SEATS = 32  # sequences at a time
FORMATS = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,  # repacked on x86: llama.cpp's fastest kernels
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q4_1": None,  # the file as it is
}
ALL_FORMATS_UP_TO = 4096  # tokens of a case; a larger one is left to the two formats that decoded fastest


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
    """A model with one context for a case."""

    def __init__(self, model: object, case: Case, threads: int) -> None:
        self.seats = min(SEATS, case.batch)
        longest = max(len(prompt) + new for prompt, new in zip(case.prompts, case.new, strict=True))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = self.seats, self.seats * (-(-longest // 256) * 256)
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
        waiting, free, live = deque(range(len(prompts))), list(range(self.seats)), {}
        while waiting or live:
            while waiting and free:
                self._admit(prompts, outputs, waiting, free, live)
                self._retire(outputs, new, free, live)
            if not live:
                continue
            rows = [(outputs[i][-1], len(prompts[i]) + len(outputs[i]) - 1, seat, True) for i, seat in live.items()]
            for i, token in zip(live, self.decode(rows), strict=True):
                outputs[i].append(token)
            self._retire(outputs, new, free, live)
        return outputs

    def _admit(self, prompts: list, outputs: list[list[int]], waiting: deque[int], free: list[int], live: dict[int, int]) -> None:
        rows: list[tuple[int, int, int, bool]] = []
        admitted = []
        while waiting and free and len(rows) + len(prompts[waiting[0]]) <= BATCH:
            index, seat = waiting.popleft(), free.pop()
            last = len(prompts[index]) - 1
            rows += [(token, position, seat, position == last) for position, token in enumerate(prompts[index])]
            live[index] = seat
            admitted.append(index)
        if not admitted:
            raise ValueError(f"a prompt is longer than {BATCH} tokens: raise BATCH")
        for index, token in zip(admitted, self.decode(rows), strict=True):
            outputs[index].append(token)

    def _retire(self, outputs: list[list[int]], new: list[int], free: list[int], live: dict[int, int]) -> None:
        for index in [index for index in live if len(outputs[index]) >= new[index]]:
            free.append(live.pop(index))
            llama_cpp.llama_memory_seq_rm(self.memory, free[-1], -1, -1)


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
    decode_speed = dict.fromkeys(FORMATS, 0.0)
    for case in sorted(workload.cases, key=lambda case: case.prompt_tokens):
        small = case.prompt_tokens + sum(case.new) <= ALL_FORMATS_UP_TO
        for name in FORMATS if small else sorted(FORMATS, key=decode_speed.__getitem__)[-2:]:
            session = Session(models[name], case, workload.threads)
            speed, tokens = measure(session.generate, workload, case)
            session.close()
            if case.kind == "decode":
                decode_speed[name] = speed
            report("llama", llama_cpp.__version__, case, speed, tokens, variant=name)


if __name__ == "__main__":
    main(sys.argv[1])
