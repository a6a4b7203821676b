"""What flows between the rooms: prompts, responses, batches, rows, heads, alignments, sparse logprobs."""
