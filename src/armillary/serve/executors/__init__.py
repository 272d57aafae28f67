"""Executors carry a schedule out; they never decide."""
