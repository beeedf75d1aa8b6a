"""The third stage: the student learns from the joined shards."""
