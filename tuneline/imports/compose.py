"""The pipeline that translations make, as YAML with comments. What pipelines.yaml would refuse becomes a comment."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tuneline.config.load import check
from tuneline.config.spec import STAGES
from tuneline.config.yaml_source import parse, yaml_value
from tuneline.errors import ConfigError, Problem
from tuneline.imports.fates import Refused, Without
from tuneline.imports.translation import Given, Note, Ref, Translation
from tuneline.wording import short

PLAIN = re.compile(r"[A-Za-z_./~][\w./~@+-]*")
ROLES = ("base", "data", "train", "merge", "quantize", "held-out", "evaluate")
NAMES = {"merge": "merged", "quantize": "quantized", "evaluate": "evaluated"}
REQUIRED = ("kind", "model", "dataset", "type", "path", "repo", "hub", "gguf", "sources", "rewards", "adapters", "calibration")
WIDTH = 120


@dataclass
class Draft:
    """Stages by name, comments by (stage, path of a field), and what the sources had that became a comment."""

    name: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the pipeline itself."""
    comments: dict[tuple[str, str], str] = field(default_factory=dict)
    origins: dict[tuple[str, str], Note] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    """Folders that paths lead into, besides that of the result."""
    used: set[str] = field(default_factory=set)
    """Keys of the sources that became fields."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Training stages by the output folder of their source."""

    def add(self, translation: Translation, several: bool = False) -> None:
        """Add the stages of one translation. One that equals a stage that exists is not added again. `several`: there are other sources,
        so places name theirs."""
        names: dict[str, str] = {}
        where = f"{translation.job.name}:" if several else ""
        self.settings |= translation.parts.pop("pipeline", {})
        for role in ROLES:
            if role in translation.parts:
                fields = _resolved(translation.parts[role], names)
                names[role] = self._name(NAMES.get(role, role) if role != "train" else fields["kind"], fields)
                self.stages[names[role]] = fields
        for (role, key), comment in translation.comments.items():
            if role in names:
                self.comments[names[role], key] = comment
        for (role, key), source in translation.origins.items():
            given = translation.job.given.get(source, Given(None, 0))
            self.origins[names.get(role, role), key] = Note(source, given, Without(""), where)
        self.notes += [replace(note, source=where) for note in translation.notes]
        self.remarks += [remark for remark in translation.remarks if remark not in self.remarks]
        self.missing += translation.missing
        self.roots += [folder for folder in translation.roots if folder not in self.roots]
        self.used |= translation.used
        if "train" in names:
            self.outputs[str(translation.value("output_dir", default="")).rstrip("/")] = names["train"]

    def _name(self, wanted: str, fields: dict[str, Any]) -> str:
        name, n = wanted, 1
        while name in self.stages and self.stages[name] != fields:
            n += 1
            name = f"{wanted}-{n}"
        return name


def _resolved(value: Any, names: dict[str, str]) -> Any:
    """Return fields in which every Ref is the name of its stage."""
    if isinstance(value, Ref):
        return names[value]
    if isinstance(value, dict):
        return {key: _resolved(inner, names) for key, inner in value.items()}
    return [_resolved(inner, names) for inner in value] if isinstance(value, list) else value


def settle(draft: Draft, target: Path) -> None:
    """Move every field that pipelines.yaml refuses into the comments, with the reason. Raises ConfigError if what is left is invalid."""
    while True:  # each round removes a field or more
        try:
            check(parse(whole_file(draft), "the result"), target / "pipelines.yaml")
        except ConfigError as error:
            if not [True for problem in error.problems if _remove(draft, problem)]:
                raise ConfigError([_about_source(draft, problem) for problem in error.problems]) from None
        else:
            return


def _remove(draft: Draft, problem: Problem) -> bool:
    """Remove the field of a problem; return whether there was one."""
    _, _, path = problem.field.partition(".")
    stage, _, rest = path.partition(".")
    at: Any = draft.stages.get(stage)
    keys = rest.split(".")
    if at is None:  # a field of the pipeline
        at, keys, stage = draft.settings, path.split("."), "pipeline"
    for key in keys[:-1]:
        at = at.get(key) if isinstance(at, dict) else at[int(key)] if isinstance(at, list) and key.isdigit() else None
    last = keys[-1]
    if isinstance(at, list) and last.isdigit() and int(last) < len(at):
        value = at.pop(int(last))
    elif isinstance(at, dict) and last in at and last not in REQUIRED:
        value = at.pop(last)
    else:
        return False
    origin = draft.origins.get((stage, keys[0]))
    unknown = problem.message.startswith("found the unknown field")
    reason = f"tuneline has no field `{last}`" if unknown else problem.message + (f": {problem.hint}" if problem.hint else "")
    given = origin.given if origin and len(keys) == 1 else Given(value, origin.given.line if origin else 0)
    key = origin.key if origin and (len(keys) == 1 or origin.given.value == value) else f"{stage}.{rest or path}"
    note = Note(key, given, Refused(reason), origin.source if origin else "")
    if note not in draft.notes:
        draft.notes.append(note)
    return True


def _about_source(draft: Draft, problem: Problem) -> Problem:
    hint = problem.hint or "add it to the source, or write the stage by hand: docs/coming-from.md lists the fields"
    return Problem(problem.field, f"the import lacks something: {problem.message}", hint, place=draft.name)


# --- text -------------------------------------------------------------------------------------------------------------


def whole_file(draft: Draft) -> str:
    roots = f"roots: {scalar(draft.roots)}\n" if draft.roots else ""
    return f"version: 1\n{roots}pipelines:\n" + pipeline_text(draft, "  ")


def pipeline_text(draft: Draft, indent: str, step: str = "  ") -> str:
    """Return the pipeline as the text of one entry of `pipelines:`, its name indented by `indent`."""
    inner = indent + step
    lines = [f"{indent}{draft.name}:", *_comment_lines(draft, inner)]
    lines += [f"{inner}{key}: {scalar(value)}" for key, value in draft.settings.items()]
    lines.append(f"{inner}stages:")
    for name, fields in draft.stages.items():
        lines.append(f"{inner}{step}{name}:")
        comments = {path: one_line(text) for (stage, path), text in draft.comments.items() if stage == name}
        for key, value in in_order(fields, STAGES[fields["kind"]]).items():
            lines += _field(inner + 2 * step, key, value, comments)
    return "\n".join(lines) + "\n"


def in_order(fields: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return fields in the order of the reference, those of inner mappings as well: `kind` and the inputs come first."""
    first = ("kind", "model", "adapter", "dataset", "sources")
    known = [*first, *(name for name in model.model_fields if name not in (*first, "resources", "seed")), "seed", "resources"]
    ordered: dict[str, Any] = {}
    for key in sorted(fields, key=lambda name: known.index(name) if name in known else len(known)):
        default = model.model_fields[key].default if key in model.model_fields else None
        inner = fields[key]
        ordered[key] = in_order(inner, type(default)) if isinstance(inner, dict) and isinstance(default, BaseModel) else inner
    return ordered


def _comment_lines(draft: Draft, indent: str) -> list[str]:
    parts = [*draft.remarks, *(f"`{path}` does not exist" for path in dict.fromkeys(draft.missing))]
    for title, kind in (("No counterpart here:", Refused), ("Without effect here:", Without)):
        reasons: dict[str, list[str]] = {}
        for note in draft.notes:
            if isinstance(note.fate, kind):
                reasons.setdefault(note.fate.reason, []).append(str(note))
        parts += [title] if reasons else []
        parts += [f"  {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    lines = []
    for part in map(one_line, parts):
        hanging = "    " if part.startswith("  ") else "  "
        lines += textwrap.wrap(part, WIDTH - len(indent), subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]


def one_line(text: str) -> str:
    """Return a text that fits in a comment: printable, on one line."""
    return "".join(character if character.isprintable() else " " for character in text)


def _field(indent: str, key: str, value: Any, comments: dict[str, str]) -> list[str]:
    """Return the lines of one field: one line if it is short, else a line for each item, or for each inner field with its comment."""
    after = f"  # {comments[key]}" if key in comments else ""
    line = f"{indent}{key}: {scalar(value)}"
    inner = {path.removeprefix(f"{key}."): text for path, text in comments.items() if path.startswith(f"{key}.")}
    if isinstance(value, dict) and len(value) == 1 and len(inner) == 1:
        after, inner = f"  # {next(iter(inner.values()))}", {}
    if (len(line + after) <= WIDTH and not inner) or not value or not isinstance(value, dict | list):
        return [line + after]
    if isinstance(value, list):
        return [f"{indent}{key}:{after}", *(f"{indent}  - {scalar(item)}" for item in value)]
    return [f"{indent}{key}:{after}", *(text for name, held in value.items() for text in _field(indent + "  ", name, held, inner))]


def scalar(value: Any) -> str:
    """Return a value in YAML's flow style, as `parse` reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, str):
        text = value.replace("${", "$${")
        is_plain = PLAIN.fullmatch(text) and isinstance(yaml_value(text), str)
        return text if is_plain else json.dumps(text, ensure_ascii=not text.isprintable())
    if isinstance(value, float):
        return f"{value:.12g}"
    return json.dumps(value)


def pipeline_name(named: str) -> str:
    """Return a valid name for a pipeline from the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", short(named).lower()).strip("-")[:50].strip("-") or "imported"
