"""Recognizes thoughts in texts that no template has written; `tasks.data.thoughts` finds how a template marks them."""

from __future__ import annotations

import re

NAMES = "think|thinking|thought|reasoning|seed:think"
START = rf"<(?:{NAMES})>|\[THINK\]|<\|START_THINKING\|>"
END = rf"</(?:{NAMES})>|\[/THINK\]|<\|END_THINKING\|>"
TAGS = re.compile(f"{START}|{END}")
CLOSED = re.compile(f".*(?:{END})", re.DOTALL)
OPENED = re.compile(f"(?:{START}).*", re.DOTALL)


def said(answer: str) -> str:
    """Return the answer without the thoughts before it; empty if it was cut off within its thoughts."""
    return OPENED.sub("", CLOSED.sub("", answer)).strip()


def before_thoughts(answer: str) -> str:
    """Return what an answer says before its first thoughts; empty if it has no mark that begins some."""
    begun = re.search(START, answer)
    return answer[: begun.start()].strip() if begun else ""
