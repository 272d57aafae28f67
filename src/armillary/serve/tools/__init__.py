"""Tool calls: how models write them, how prompts tell of them, how an answer is read, and how well (BFCL)."""
