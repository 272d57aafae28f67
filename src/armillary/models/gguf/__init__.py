"""GGUF: the file format of llama.cpp, read (memory-mapped, validated) and written."""
