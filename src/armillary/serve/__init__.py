"""Requests, scheduler policies, the paged KV cache, sampling, the engine loop, HTTP."""
