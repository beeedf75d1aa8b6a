"""Figures of a stage that tell a run gone wrong, and the thresholds that they are held against."""
