"""The first stage: the student samples responses."""
