"""What a model does, as data: architectures that need no weights, and the operations of a batch under a parallel layout."""
