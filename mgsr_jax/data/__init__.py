"""Instruction data: records, tokens, spans, batches, and the teacher cache."""
