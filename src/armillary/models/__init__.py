"""Architectures and their weights (safetensors, GGUF, HF folders), tokenizers, chat templates."""
