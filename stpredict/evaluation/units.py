"""Numbers and formulae as people read them. Torch-free."""

import math
import re

from markupsafe import Markup, escape

GREEK = {
    "alpha": "\N{GREEK SMALL LETTER ALPHA}",
    "beta": "\N{GREEK SMALL LETTER BETA}",
    "gamma": "\N{GREEK SMALL LETTER GAMMA}",
}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count(value: float) -> str:
    """92,320 → 92.3 k; 1.2e9 → 1.2 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def four_digits(value: float | None) -> str:
    """Of a measurement; a dash where it is not defined."""
    return "\N{EN DASH}" if value is None else f"{value:.4g}"


def power(value: float, digits: int = 3) -> str:
    """2.62e15 → 2.62·10¹⁵."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    exponent = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if mantissa == "1" else f"{mantissa}·10{exponent}"


def formula(text: str) -> Markup:
    """A N^-alpha, with its exponent raised and its Greek letters Greek, as HTML."""
    text = re.sub("|".join(GREEK), lambda found: GREEK[found[0]], str(escape(text)))
    return Markup(re.sub(r"\^(-?\w+)", r"<sup>\1</sup>", text))
