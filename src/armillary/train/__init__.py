"""The trainer: real text in, a good model out, on a laptop or on many ranks."""
