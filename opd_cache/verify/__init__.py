"""Comparing a whole run with what its files say of each other, and taking out what is damaged."""
