"""A process that serves a teacher who sees one token back, and fails one request in twenty.

It prints its URL, serves until its standard input ends, and prints how many requests it has seen.
"""

import sys

import numpy as np
from served_teacher import ServedTeacher

KINDS = ["lost", "lost midway", "429", "500", "503"]


def bigram_logprobs() -> np.ndarray:
    """[V, V]: of the next token after each token."""
    logits = np.random.default_rng(7).normal(size=(258, 258)) * 3
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def main() -> None:
    table = bigram_logprobs()
    faults = np.random.default_rng(8).choice([None, *KINDS], 12_000, p=[0.95, *[0.01] * 5])
    with ServedTeacher(lambda ids: table[ids], "sglang", fault=lambda number, ids: faults[number]) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(len(server.asked), flush=True)


if __name__ == "__main__":
    main()
