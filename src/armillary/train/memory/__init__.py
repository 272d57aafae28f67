"""Memory of a training step: counted, predicted, and traded for arithmetic."""
