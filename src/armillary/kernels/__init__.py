"""Hot operations: one file each, the reference beside the fast path."""
