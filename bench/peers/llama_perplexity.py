"""llama.cpp's loss on the windows of `bench/perplexity.py`, in each weight format: python -m peers.llama_perplexity task.json"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy
from peers.llama import BATCH, FORMATS, requantised
from peers.workload import MARK


def losses(model: object, windows: list[list[int]], threads: int) -> list[float]:
    """Mean -ln p of each window's tokens but the first, each window from an empty cache."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = -(-len(windows[0]) // 256) * 256
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
    found = []
    for window in windows:
        llama_cpp.llama_memory_clear(memory, True)
        total = 0.0
        for start in range(0, len(window), BATCH):
            piece = window[start : start + BATCH]
            batch.n_tokens = len(piece)
            for index, token in enumerate(piece):
                batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, start + index, 1
                batch.seq_id[index][0], batch.logits[index] = 0, True
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for index, target in enumerate(window[start + 1 : start + 1 + len(piece)]):
                row = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, index), shape=(vocabulary,)).astype(numpy.float64)
                peak = row.max()
                total += float(peak + numpy.log(numpy.exp(row - peak).sum()) - row[target])
        found.append(total / (len(window) - 1))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return found


def main(path: str) -> None:
    task = SimpleNamespace(**json.loads(Path(path).read_text()))
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    for name in FORMATS:
        file = requantised(task, name)
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        result = {
            "variant": f"llama.cpp {name}", "version": llama_cpp.__version__, "bytes": file.stat().st_size,
            "losses": {corpus: losses(model, windows, task.threads) for corpus, windows in task.windows.items()},
        }  # fmt: skip
        llama_cpp.llama_model_free(model)
        sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
