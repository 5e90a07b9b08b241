"""Format numbers and times for people: in tables, reports and log lines. Sizes: `tuneline.disk.human`."""

from __future__ import annotations

from datetime import datetime


def number(value: float, digits: int = 4) -> str:
    """Format a metric: whole from 1,000 on, else with `digits` significant digits."""
    whole = abs(value) >= 1000 or value == int(value)
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.{digits}g}"


def with_error(text: str, error: float | None) -> str:
    """Append a standard error, unless it is 0 or unknown."""
    return text + (f" ± {error:.2g}" if error else "")


def duration(seconds: float) -> str:
    """Format seconds as `3.2 s`, `1 min 10 s` or `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def age(seconds: float) -> str:
    """Format seconds in their largest unit: `5 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def local_time(moment: str | None) -> str:
    """Format an ISO time in the local time zone."""
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def utc_time(moment: str | None) -> str:
    """Format an ISO time, which is in UTC."""
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M:%S UTC") if moment else ""
