"""Changes the chat template of a base model as its stage says, before anything is rendered: another template from a file, values of
its arguments, and a fixed date in place of the clock.

All of it is text in the template itself, so it is saved with every model and adapter and is part of the template's hash:
transformers, servers and other readers render what was trained on, without any argument.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.errors import StageFailed
from tuneline.kinds.model import RENDERED, ModelStage
from tuneline.wording import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = str | dict[str, str] | None
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"  # the default template, and the others if a model has several
QUESTION = "Zquestion"  # a word that no template writes on its own
CLOCK = "strftime_now"  # the only function by which a template can ask transformers for the date
DATE = datetime(2024, 7, 26)  # Llama 3's templates use this date if there is no clock
CODES = "dbBmYyAajHMSp"
MORE_CODES = "IeklcxXDFTRrhCgGuUVwWZz"  # the other codes of C's strftime; templates without them keep the shorter macro, and their hash
UNPADDED = "dmHIMSjyUVWCgu"  # codes that can have a `-`, which removes leading zeros


def set_template(tokenizer: PreTrainedTokenizerBase, stage: ModelStage, file: Path | None) -> bool:
    """Give the tokenizer the stage's template and arguments. Returns whether the stage sets any.

    Raises StageFailed(config) for a template that does not render a question, and for arguments that no template reads.
    """
    if file is None and not stage.chat_template_kwargs:
        return False
    if file is not None:
        tokenizer.chat_template = read_template(file)
    given = tokenizer.chat_template
    if given is None:
        message = "chat_template_kwargs: found arguments, but the model has no chat template"
        raise StageFailed("config", message, "name a template with `chat_template: FILE`")
    where = f"chat_template: {file.name}" if file is not None else "the model's chat template"
    templates = given if isinstance(given, dict) else {"default": given}
    read = {name: names_read(text, tokenizer, where) for name, text in templates.items()}
    known = sorted(set().union(*read.values()))
    for name in stage.chat_template_kwargs:
        if name not in known:
            expected = f"expected an argument that the template reads: {', '.join(known) or 'it reads none'}"
            hint = nearest(name, known) or "remove it: it would have no effect"
            raise StageFailed("config", f"chat_template_kwargs: found `{name}`, {expected}", hint)
    changed = {}
    for name, text in templates.items():
        values = {argument: value for argument, value in stage.chat_template_kwargs.items() if argument in read[name]}
        changed[name] = with_defaults(text, values)
    tokenizer.chat_template = changed if isinstance(given, dict) else changed["default"]
    check_question(tokenizer, where)
    return True


def read_template(file: Path) -> str:
    """Read a template file. Without the line end of its last line, which Jinja ignores and other readers may not."""
    if not file.is_file():
        raise StageFailed("config", f"chat_template: found the folder {file.name}, expected a file", "name the .jinja file")
    try:
        text = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except ValueError as error:
        raise StageFailed("config", f"chat_template: {file.name} is no UTF-8 text: {error}", "name a Jinja template") from error
    if not text.strip():
        raise StageFailed("config", f"chat_template: found an empty file, {file.name}", "name a Jinja template")
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), dict):
            hint = "write the text of its `chat_template` to a file of its own"
            raise StageFailed("config", f"chat_template: found JSON in {file.name}, expected a Jinja template", hint)
    return text


def names_read(template: str, tokenizer: PreTrainedTokenizerBase, where: str) -> set[str]:
    """Return the arguments that a template reads, apart from those of every rendering. A variable that the template sets is an argument
    if it asks whether the caller has set it. Raises StageFailed(config) for a syntax error."""
    from jinja2 import TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables
    from jinja2.nodes import Filter, Name, Test
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
        names = find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        message = f"{where}, line {error.lineno}: {error.message}"
        raise StageFailed("config", message, "write a Jinja template, as transformers and servers read it") from error
    except (RecursionError, SyntaxError, MemoryError) as error:  # of Python, to which Jinja translates it
        raise StageFailed("config", f"{where}: it is nested too deeply", "write a simpler template") from error
    own = {name.name for name in tree.find_all(Name) if name.ctx == "store"}
    asked = {
        test.node.name
        for test in tree.find_all((Test, Filter))
        if test.name in ("defined", "undefined", "default", "d") and isinstance(test.node, Name)
    }
    return names - (own - asked) - {*RENDERED, *tokenizer.special_tokens_map}


def with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """Set arguments that a caller leaves out, in a way that templates themselves use and every reader knows."""
    steps = (f"{{%- if {name} is not defined %}}{{%- set {name} = {literal(value)} %}}{{%- endif %}}" for name, value in values.items())
    return after("".join(steps), template)


def literal(value: Any) -> str:
    """Write a value as Jinja and other readers of templates do: JSON, without escapes for characters beyond ASCII."""
    return json.dumps(value, ensure_ascii=False)


def after(head: str, template: str) -> str:
    """Put statements before a template. A line end between them keeps its leading space: Jinja removes the first line end after a
    statement, and space before a statement at the beginning of a line."""
    return f"{head}\n{template}" if head and template[:1].isspace() else f"{head}{template}"


def check_question(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises StageFailed(config) unless the template renders a question, as text or as a list of parts."""
    problem = ""
    system = {"role": "system", "content": "Help."}  # which some templates demand
    for content, before in product((QUESTION, [{"type": "text", "text": QUESTION}]), ([], [system])):
        try:
            messages = [*before, {"role": "user", "content": content}]
            if QUESTION in str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)):
                return
        except Exception as error:  # a template may raise anything: its own refusal, or a Python error
            problem = problem or f"it refuses a question: {type(error).__name__}: {error}"
    hint = "try it with `tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)` of transformers"
    raise StageFailed("config", f"{where}: {problem or 'it leaves out what the user says'}", hint)


# --- files ------------------------------------------------------------------------------------------------------------


def save_template(template: Template, folder: Path) -> None:
    """Write the template where transformers looks for it, in place of others. Links to a cache are replaced, never written to."""
    for name in (FILE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    if (folder / FOLDER).exists():
        shutil.rmtree(folder / FOLDER)
    config = folder / "tokenizer_config.json"
    if config.exists() and "chat_template" in (document := json.loads(config.read_bytes())):
        del document["chat_template"]
        config.unlink()
        config.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    templates = template if isinstance(template, dict) else {"default": template or ""}
    for name, text in templates.items():
        file = folder / FILE if name == "default" else folder / FOLDER / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def saved_template(folder: Path) -> Template:
    """Read what `save_template` wrote; None if there is nothing."""
    files = {file.stem: file for file in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).exists():
        files = {"default": folder / FILE, **files}
    templates = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return templates.get("default") if templates.keys() <= {"default"} else templates


# --- the clock --------------------------------------------------------------------------------------------------------


def fix_clock(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the clock of templates that write today's date into the system prompt, which would make runs differ from day to day.
    The replacement is a macro in the template, so it is saved with the template and part of its hash."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: with_fixed_clock(one) for name, one in template.items()}
    elif template is not None:
        tokenizer.chat_template = with_fixed_clock(template)


def with_fixed_clock(template: str) -> str:
    if CLOCK not in template or f"macro {CLOCK}(" in template:
        return template
    codes = [f"%{code}" for code in CODES]
    if not set(re.findall(r"(?<!\{)%-?[a-zA-Z]", template)) <= set(codes):
        codes = [*(f"%-{code}" for code in UNPADDED), *codes, *(f"%{code}" for code in MORE_CODES)]
    steps = "".join(f" | replace('{code}', '{DATE.strftime(code)}')" for code in codes)
    return after(f"{{%- macro {CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}", template)
