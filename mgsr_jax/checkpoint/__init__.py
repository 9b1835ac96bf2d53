"""Reads and writes Hugging Face folders, and the state from which a run resumes."""
