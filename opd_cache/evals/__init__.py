"""Evaluation: held-out prompts sampled, scored and graded with the same stages as training."""
