"""Templates that tests of other people's chat templates share, and the tokenizer that renders them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pico import tokenizer
from template_table import asked, parts, said

from tasks.data.masks import Tokens

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# An empty block of thoughts before the last answer alone.
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
)
ENDS_WHOLE = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
OPENS = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"  # and drops the block of what was said
THREE = asked(*(said(role, f"{role[0]}{i}") for i in (1, 2, 3) for role in ("user", "assistant")))


@lru_cache
def kept() -> tuple[Any, str]:
    found = tokenizer()
    return found, found.chat_template


def words(template: str = "") -> Any:
    """SmolLM2's tokenizer, by default with its own template: one for all tests, because it takes a second to load."""
    found, own = kept()
    found.chat_template = template or own
    return found


def trained(tokens: Tokens, by: Any) -> str:
    return "".join(parts(tokens, by, True))


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<repo_name>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}<file_sep>{% endfor %}<|im_end|>\n{% endfor %}" + ASK
)
THOUGHT = "<think>\nBecause.\n</think>\n\nA"

SPEAKERS = TURN.replace("{% for m in messages %}", "{% for m in messages if m.role in ['user', 'assistant'] %}") + ASK
WITH_TOOLS = "{{ tools | tojson if tools }}" + CALLS
SYSTEM = said("system", "You are polite.")
QUESTION, ANSWER = said("user", "Q"), said("assistant", "A")

# Thoughts of the last answer in a block.
THINKING = (
    TURN.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
    )
    + ASK
)
# Channels, as gpt-oss has them, by special tokens that the pico models' tokenizer knows.
CHANNELED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "<file_sep>analysis<repo_name>{{ m.reasoning_content }}<gh_stars><|im_start|>assistant{% endif %}"
    "{% if m.role == 'assistant' %}<file_sep>final{% endif %}<repo_name>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
