"""Numbers and other people's text, made fit for a terminal."""

import unicodedata


def short(number: float) -> str:
    """A count in three figures: 950, 1.23 k, 45.6 M.

    >>> short(45_600_000)
    '45.6 M'
    """
    for size, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= 0.9995 * size:
            return f"{figures(number / size)}{unit}"
    return figures(number)


def figures(number: float) -> str:
    """Three significant figures without an exponent; whole numbers stay whole."""
    if number == int(number) or abs(number) >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.2g}"


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """`54.0`, or `54.0 (44-63)` with an interval."""
    bounds = f" ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})" if interval else ""
    return f"{100 * share:.1f}{bounds}"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def harmless(text: str) -> str:
    """The text with whatever could steer a terminal (escape sequences, reversed writing) shown as a replacement character."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
