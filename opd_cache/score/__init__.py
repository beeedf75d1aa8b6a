"""The second stage: a teacher gives its log-prob of every sampled token."""
