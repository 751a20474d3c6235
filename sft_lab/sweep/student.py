"""Student's t distribution: how large a difference chance makes of few runs; the standard library lacks it."""

from __future__ import annotations

import math


def t_quantile(p: float, df: int) -> float:
    """The quantile of Student's t distribution, for p above 0.5; by bisection of the closed form."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, df) < 2 * p - 1 else (low, middle)
    return high


def _t_probability(t: float, df: int) -> float:
    """The probability of -t to t (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    term = total = 1.0 if df % 2 == 0 else math.cos(angle)
    for k in range(2 if df % 2 == 0 else 3, df, 2):
        term *= squared * (k - 1) / k
        total += term
    if df % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if df > 1 else 0.0))
