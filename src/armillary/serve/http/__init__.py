"""The OpenAI-compatible HTTP API: requests in, JSON or server-sent events out."""
