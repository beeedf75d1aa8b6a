"""Prompts: read from anywhere, tokenized once, published in the run directory."""
