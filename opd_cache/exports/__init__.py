"""Giving a run to other programs: its responses as rows of one kind, in their formats."""
