"""The forward pass in plain torch: the reference, and the way where the native kernels cannot run."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from armillary.kernels.low_rank import Layer
from armillary.kernels.packed_linear import choose_library, pack
from armillary.kernels.paged_attention import PagedCache
from armillary.kernels.rope import FAR
from armillary.models.decoder import Decoder
from armillary.serve.executors.forward import FlatBatch, Logits
from armillary.serve.executors.torch_adapters import Adapted, TorchAdapter
from armillary.serve.executors.torch_attention import attention_of
from armillary.serve.kv_policies import DENSE, KVPolicy


class TorchForward:
    """`Forward` on the decoder itself.

    `decoder` stays as it is: its weights are packed into a copy that shares the embedding and the norms, unless `in_place`
    says that nobody else needs the plain ones (half the memory). `library` as in `kernels.packed_linear`. `kv` says
    what is kept of keys and values, and read. Raises InputError where torch has no kernels for that.
    """

    own_threads = False

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        library: str | None = None,
        in_place: bool = False,
        kv: KVPolicy = DENSE,
    ) -> None:
        config = decoder.config
        weight = decoder.embed_tokens.weight
        self.library = choose_library() if library is None else library
        self.name = f"torch ({self.library})"
        model = decoder if in_place else sharing_copy(decoder)
        begin = time.perf_counter()
        self.packed_bytes = pack(model, self.library)
        self.prepared = f"packed in {time.perf_counter() - begin:.2f} s"
        self.decoder = model.eval()
        self._far = kv.unbounded
        self._adapted: Adapted | None = None  # since the first adapter
        self.cache = PagedCache(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, weight.dtype, weight.device
        )
        self._attend, beside = attention_of(kv, self.cache, config)
        self.cache_bytes = self.cache.nbytes + beside

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that are held: packed ones and those shared with the decoder that was given."""
        return self.packed_bytes + sum(parameter.nbytes for parameter in self.decoder.parameters())

    def logits(self, batch: FlatBatch) -> Logits:
        device = self.decoder.embed_tokens.weight.device
        tokens, positions = _index(batch.tokens).to(device), _index(batch.positions).to(device)
        if self._far and max(batch.positions, default=0) >= FAR:
            positions = positions.double()
        attend = self._attend(batch.spans)
        rows = batch.rows
        with self._adapted.chosen(batch) if self._adapted is not None else nullcontext():
            if not rows:  # chunks that end within their prompts: only the cache is wanted
                self.decoder.hidden(tokens, positions, attend)
                return Logits(torch.empty(0, self.decoder.config.vocab_size))
            if batch.hidden:
                hidden = self.decoder.hidden(tokens, positions, attend)[_index(rows).to(device)]
                return Logits(self.decoder.head(hidden), hidden=hidden)
            every = len(rows) == len(tokens) and list(rows) == list(range(len(rows)))
            return Logits(self.decoder(tokens, positions, attend, None if every else _index(rows).to(device)))

    def pack_adapter(self, layers: Sequence[Layer]) -> TorchAdapter:
        if self._adapted is None:
            self._adapted = Adapted(self.decoder)
        return TorchAdapter(layers, self.decoder.config, self.decoder.embed_tokens.weight.device)

    def with_layers(self, kept: Sequence[int]) -> TorchForward:
        config, cache = self.decoder.config, self.cache
        other = copy.copy(self)
        other.name = f"{self.name}, {len(kept)} layers"
        other.packed_bytes, other._adapted = 0, None
        other.decoder = copy.copy(self.decoder)
        other.decoder._modules = dict(self.decoder._modules)
        other.decoder.layers = nn.ModuleList([self.decoder.layers[layer] for layer in kept])
        own = PagedCache(
            len(kept), cache.num_blocks, cache.block_size, config.num_kv_heads, config.head_dim, cache.keys[0].dtype, cache.keys[0].device
        )
        other.cache_bytes = own.nbytes
        for tensors in (own.keys, own.values):  # a layer knows itself by its place in the whole model
            placed = dict(zip(kept, tensors, strict=True))
            tensors[:] = [placed.get(layer, tensors[0]) for layer in range(config.num_layers)]
        other.cache = own
        other._attend, _ = attention_of(DENSE, own, config)
        return other

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.cache.contents.copy(copies)

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        return self.cache.contents.read(blocks)

    def write_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        self.cache.contents.write(blocks, data)


def _index(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))


def sharing_copy(decoder: Decoder) -> Decoder:
    """A copy of the module tree with the same tensors."""
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, shared)
