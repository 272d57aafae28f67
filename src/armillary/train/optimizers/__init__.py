"""Optimizers, one a file, each a torch `Optimizer` with the paper's defaults."""
