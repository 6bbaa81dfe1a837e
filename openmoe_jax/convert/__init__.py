"""Checkpoints in and out: T5X, Orbax, Hugging Face; everything streams, nothing is ever in memory as a whole."""
