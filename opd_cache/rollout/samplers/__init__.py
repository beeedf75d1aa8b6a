"""Samplers: one class a backend."""
