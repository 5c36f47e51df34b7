"""Unit conversions, and numbers formatted for people."""

from __future__ import annotations

import math


def bits_per_char(nats_per_char: float) -> float:
    """Convert a loss from nats to bits per character."""
    return nats_per_char / math.log(2)


def perplexity(nats_per_char: float) -> float:
    """Convert a loss in nats per character to the equivalent number of equally likely choices."""
    return math.exp(nats_per_char)


def human_count(number: float) -> str:
    """Return a count with three digits: 818048 is "818 k", 10.7e6 is "10.7 M"."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * limit:  # 999,500 is 1 M, not 1e+03 k
            return f"{number / limit:.3g}{unit}" if number < 1000 * limit else f"{number:.3g}"
    return f"{number:.3g}"


def human_time(seconds: float) -> str:
    """Return a duration: 5 is "5 s", 65 is "1 min 05 s", 3700 is "1 h 01 min"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"
