"""A tiny model, uneven documents and the same batch for ever: what the tests of a step share."""

import torch

from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.train.microbatch import IGNORED, MicroBatch
from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.apply import Single
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

TINY = ModelConfig("llama", 61, 24, 40, 2, 4, 2, 6, 128, tie_embeddings=True)


def decoder(seed=0, config=TINY):
    torch.manual_seed(seed)
    return Decoder(config)


def documents(count=8, seed=0):
    """Documents of uneven length, some targets not scored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(0, 61, (3 + 5 * index % 17,), generator=generator)
        targets = ids[1:].clone()
        targets[torch.rand(len(targets), generator=generator) < 0.3] = IGNORED
        made.append((ids[:-1], targets))
    return made


def pack(docs):
    """Documents as one micro-batch."""
    tokens, targets = (torch.cat(part) for part in zip(*docs, strict=True))
    lengths = tuple(len(ids) for ids, _ in docs)
    return MicroBatch(tokens, targets, torch.cat([torch.arange(n) for n in lengths]), lengths)


class Repeat:
    """The same batch for ever."""

    def __init__(self, batch):
        self.batch, self.given = batch, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        return self.batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def trainer(batch, model=None, steps=4, **options):
    return Trainer(
        Single(model or decoder()),
        lambda named: AdamW([p for _, p in named], lr=1e-2),
        Schedule("constant", steps),
        Repeat(batch),
        **options,
    )
