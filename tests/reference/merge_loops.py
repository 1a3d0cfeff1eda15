"""Token merging with one loop per step, in float64."""

from __future__ import annotations

import math


def merge_tokens_by_loops(tokens: list[list[float]], num_tokens: int, num_heads: int) -> list[list[float]]:
    """One frame's tokens merged to `num_tokens` (ToMe, arXiv 2210.09461, in the rounds and order of `merge_tokens`)."""
    sizes = [1.0] * len(tokens)
    while len(tokens) > num_tokens:
        sources, destinations = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
        best = {}
        for source in sources:
            scores = [_cosine(_key(tokens[source], num_heads), _key(tokens[d], num_heads)) for d in destinations]
            index = max(range(len(scores)), key=lambda n: scores[n])
            best[source] = (scores[index], destinations[index])
        ranked = sorted(sources, key=lambda source: -best[source][0])
        num_merged = min(len(tokens) // 2, len(tokens) - num_tokens)
        groups = {d: [d] for d in destinations}
        for source in ranked[:num_merged]:
            groups[best[source][1]].append(source)
        order = [[source] for source in ranked[num_merged:]] + [groups[d] for d in destinations]
        tokens, sizes = (
            [_mean([tokens[n] for n in group], [sizes[n] for n in group]) for group in order],
            [sum(sizes[n] for n in group) for group in order],
        )
    return tokens


def _key(token: list[float], num_heads: int) -> list[float]:
    width = len(token) // num_heads
    return [sum(token[head * width + n] for head in range(num_heads)) / num_heads for n in range(width)]


def _cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(sum(a * a for a in first)) / math.sqrt(sum(b * b for b in second))


def _mean(tokens: list[list[float]], sizes: list[float]) -> list[float]:
    total = sum(sizes)
    return [sum(t[n] * s for t, s in zip(tokens, sizes, strict=True)) / total for n in range(len(tokens[0]))]
