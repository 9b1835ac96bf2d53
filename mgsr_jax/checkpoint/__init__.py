"""Hugging Face folders in and out, and the state that a resume needs."""
