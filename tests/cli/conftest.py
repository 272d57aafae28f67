"""The command as users run it, and a tiny model with a tokenizer and a chat template of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from command_line import Command, environment

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def armillary() -> Command:
    """Run the command to its end. `stdin` is text, or None for no stdin at all."""

    def run(*arguments: object, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "armillary", *map(str, arguments)]
        source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(**variables), **source)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 60,000 parameters, a byte-level tokenizer and a chat template."""
    import tokenizers
    import torch

    from armillary.models.config import ModelConfig
    from armillary.models.decoder import Decoder
    from armillary.models.hf import save_hf

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(specials)
    config = ModelConfig(
        architecture="llama",
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_context=2048,
        bos_token_id=0,
        eos_token_ids=(2,),
    )
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.05)
    save_hf(decoder, folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": specials[0], "eos_token": specials[2], "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def measured_profile(tiny_model: Path, tmp_path: Path) -> Path:
    """A profile of this machine whose engine serves `tiny_model`: 1 ms an iteration and 10 us a token of it, whatever was cached."""
    from armillary.cluster.machine import describe
    from armillary.cluster.profile import Identity, LinkRate, MemoryRate, ProductRate, Profile, Transfer
    from armillary.models.graph.find import runnable
    from armillary.serve import calibration
    from armillary.serve.config import EngineConfig
    from armillary.sim.batch import Batch
    from armillary.sim.costs.fitting import Sample

    batches = [Batch(((query, 0),), 0, 0, 1) for query in (1, 16, 64, 256, 512)]
    batches += [Batch((), count, count * cached, count) for count in (1, 2, 8, 64) for cached in (0, 128, 512)]
    known = calibration.identity(runnable(str(tiny_model)), EngineConfig(), 1)
    rows = calibration.rows_of(known | {"disturbed": ""}, [Sample(batch, 1_000_000 + 10_000 * batch.tokens) for batch in batches])
    machine = Identity.of(describe()).model_copy(update={"memory": 8 * 10**9})
    products = (ProductRate(library="torch", dtype="fp32", threads=1, m=1, n=64, k=64, seconds=1e-6),)
    memory = (MemoryRate(operation="read", threads=1, size=10**6, bandwidth=1e10),)
    transfers = (Transfer(size=8, seconds=1e-6), Transfer(size=10**6, seconds=1e-3))
    path = tmp_path / "here.json"
    Profile(
        machine=machine,
        taken="today",
        seconds=1,
        load_before=0,
        load_after=0,
        others=0.0,
        products=products,
        memory=memory,
        links=(LinkRate(name="shared-memory", transfers=transfers),),
        engine={"tiny": rows},
    ).save(path)
    return path
