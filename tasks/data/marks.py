"""How thoughts are marked in texts that no template has written; `tasks.data.thoughts` sees how a template does."""

from __future__ import annotations

import re

NAMES = "think|thinking|thought|reasoning|seed:think"
START = rf"<(?:{NAMES})>|\[THINK\]|<\|START_THINKING\|>"
END = rf"</(?:{NAMES})>|\[/THINK\]|<\|END_THINKING\|>"
TAGS = re.compile(f"{START}|{END}")
CLOSED = re.compile(f".*(?:{END})", re.DOTALL)
OPENED = re.compile(f"(?:{START}).*", re.DOTALL)


def said(answer: str) -> str:
    """The answer without what the model thought before it; nothing of one that was still thinking when it was cut off."""
    return OPENED.sub("", CLOSED.sub("", answer)).strip()
