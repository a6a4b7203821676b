"""The student that leaves a run: weights, tokenizer, card."""
