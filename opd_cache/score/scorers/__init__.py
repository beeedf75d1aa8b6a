"""Scorers: one class a backend."""
