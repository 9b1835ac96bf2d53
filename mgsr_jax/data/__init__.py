"""Records, tokens, phrases, batches, and the teacher's outputs on disk."""
