"""A student as one GGUF file, which llama.cpp and what builds on it load."""
