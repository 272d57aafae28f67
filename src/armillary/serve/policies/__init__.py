"""Scheduler policies: one a file, each a pure function from the engine's state to a schedule."""
