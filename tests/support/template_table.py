"""What becomes of other people's chat templates: the table in docs/templates.md. `python tests/support/template_table.py` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.data.masks import Tokens, sequences
from tasks.data.rendering import form
from tasks.data.rows import Row
from tuneline.errors import StageFailed

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "templates.md"
OURS = Path(__file__).parent / "templates"
BEGIN = "<!-- tests/support/template_table.py -->\n"
# What a template's own tokenizer has a token for.
MARKERS = re.compile(r"<[|｜]?[\w▁:/.]+[|｜]?>|\[/?[A-Z_]+\]|\[\|\w+\|\]|<\|\"\|>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3
CALL = {"type": "function", "id": "alarm0123", "function": {"name": "alarm", "arguments": {"zone": "Oslo", "at": "7:30"}}}
PARAMETERS = {"type": "object", "properties": {name: {"type": "string", "description": "text"} for name in ("zone", "at")}}
TOOL = {"type": "function", "function": {"name": "alarm", "description": "Wakes.", "parameters": PARAMETERS}}


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def asked(*messages: dict[str, Any], **extra: Any) -> Row:
    return Row("s", messages=messages, extra=extra, id="r")


CALLS = (said("user", "Q1"), said("assistant", "", tool_calls=[CALL]), said("tool", "T1", tool_call_id=CALL["id"]), said("assistant", "A1"))
# Column: a row, what of it must be trained, and what must be rendered.
SHAPES: dict[str, tuple[Row, list[str], list[str]]] = {
    "one turn": (asked(said("user", "Q1"), said("assistant", "A1")), ["A1"], ["Q1"]),
    "line end first": (asked(said("user", "Q1"), said("assistant", "\n\n  A1")), ["A1"], ["Q1"]),
    "several turns": (
        asked(*(said(role, f"{role[0].upper()}{i}") for i in (1, 2, 3) for role in ("user", "assistant"))),
        ["A1", "A2", "A3"],
        ["U1", "U2", "U3"],
    ),
    "system": (asked(said("system", "Sir"), said("user", "Q1"), said("assistant", "A1")), ["A1"], ["Sir"]),
    "greeting first": (asked(said("assistant", "Hello"), said("user", "Q1"), said("assistant", "A1")), ["A1"], ["Hello"]),
    "calls": (asked(*CALLS, tools=[TOOL]), ["alarm", "zone", "Oslo", "at", "7:30", "A1"], ["Wakes.", "T1"]),
    "thoughts": (asked(said("user", "Q1"), said("assistant", "A1", reasoning_content="Why")), ["Why", "A1"], []),
}


def templates() -> dict[str, str]:
    """TRL's, by name, without those that it patches for its own masks."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja")) if not file.stem.endswith("_training")}


def more_templates() -> dict[str, Any]:
    """Those of other models, by name: a template, or, where a model has several, those by their names (`hermes.tool_use.jinja`)."""
    found: dict[str, Any] = {}
    for file in sorted(OURS.glob("*.jinja")):
        model, _, name = file.stem.partition(".")
        text = file.read_text(encoding="utf-8")
        found[model] = found.get(model, {}) | {name: text} if name else text
    return found


def outcome(shape: str, tokenizer: Any) -> str:
    """`yes`, with the number of sequences where there are several, `lost` what the template leaves out, or `refused`."""
    row, trained, shown = SHAPES[shape]
    try:
        found = sequences(row, tokenizer)
    except StageFailed as error:
        return "refused" if error.failure_class == "data" else error.message
    text = "".join(part for tokens in found for part in parts(tokens, tokenizer, False))
    answers = "".join(part for tokens in found for part in parts(tokens, tokenizer, True))
    for contents, where, others in ((trained, answers, shown), (shown, text, [])):
        if missing := [word for word in contents if word not in where]:
            return f"lost: {', '.join(missing)}"
        assert not [word for word in others if word in where], (shape, where)  # no prompt is trained on
    return "yes" if len(found) == 1 else f"yes ({len(found)})"


def parts(tokens: Tokens, tokenizer: Any, trained: bool) -> Iterator[str]:
    yield tokenizer.decode([token for token, counts in zip(tokens.input_ids, tokens.trained, strict=True) if counts or not trained])


def with_markers(tokenizer: Any) -> Any:
    """The tokenizer with a token for whatever one of the templates marks by one, as each model's own has."""
    texts = " ".join(map(str, [*templates().values(), *more_templates().values()]))
    tokenizer.add_tokens(sorted(set(MARKERS.findall(texts))), special_tokens=True)
    return tokenizer


def table(tokenizer: Any, known: dict[str, Any]) -> str:
    lines = [f"| template | {' | '.join(SHAPES)} | ends a turn |", "|---" * (2 + len(SHAPES)) + "|"]
    for name, tokenizer.chat_template in known.items():
        ends = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(list(form(tokenizer).ends))).replace("|", "\\|")
        lines.append(
            f"| `{name}` | {' | '.join(outcome(shape, tokenizer) for shape in SHAPES)} | {ends or 'nothing'} |".replace("<|", "<\\|")
        )
    return "\n".join(lines) + "\n"


def tables(tokenizer: Any) -> str:
    """With the way in which Llama 3, Qwen, DeepSeek and most others split texts: SmolLM2's joins line ends at the end of a prompt only."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    with_markers(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Split(Regex(WORDS), "isolated"), ByteLevel(False, use_regex=False)])
    return f"TRL's:\n\n{table(tokenizer, templates())}\nOf other models, written from what is public of them:\n\n{table(tokenizer, more_templates())}"


if __name__ == "__main__":
    from pico import tokenizer

    head, _, _ = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(head + BEGIN + tables(tokenizer()), encoding="utf-8")
