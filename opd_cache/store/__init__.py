"""Immutable files: how they are published, sealed, read and joined."""
