"""Text into batches: corpora, readers, tokens in shards, mixtures, packing, chat with masks, and the input pipeline."""
