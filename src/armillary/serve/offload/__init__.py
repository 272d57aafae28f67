"""Serving a model larger than the accelerator: which weights, keys and activations lie where, when they move, and what it costs."""
