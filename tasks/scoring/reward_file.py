"""Loads a reward function from a user's file, and checks that it can be called, before anything expensive begins."""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tuneline.errors import StageFailed

ALWAYS = ("prompts", "completions", "id", "answer")
SIGNATURE = "def {name}(prompts: list[str], completions: list[str], **columns) -> list[float]: ..."


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Load the function. Raises StageFailed(config) if it does not exist, or cannot be called as a reward."""
    hint = f"write `{SIGNATURE.format(name=name)}`"
    members = vars(load_module(file))
    if name not in members:
        functions = [member for member, value in members.items() if inspect.isfunction(value) and value.__module__ == members["__name__"]]
        near = difflib.get_close_matches(name, functions, 1)
        found = f"{file}: found no function `{name}`, expected {', '.join(functions) or 'a file that defines one'}"
        raise StageFailed("config", found, f"did you mean `{near[0]}`?" if near else hint)
    function = members[name]
    if not inspect.isfunction(function):
        raise StageFailed("config", f"{file}: found `{name}` as {type(function).__name__}, expected a function", hint)
    place = f"{file}:{function.__code__.co_firstlineno}"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        kind = "an async function" if inspect.iscoroutinefunction(function) else "a generator"
        raise StageFailed("config", f"{place}: found `{name}` as {kind}, expected a plain function", hint)
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters)
    positional = [each.name for each in parameters if each.kind == each.POSITIONAL_ONLY and each.default is each.empty]
    by_name = {each.name for each in parameters}
    if not takes_any or positional or "completions" not in by_name:
        found = f"{place}: found `{name}{inspect.signature(function)}`, expected (prompts, completions, **columns)"
        raise StageFailed("config", found, hint)
    return function


def required_columns(function: Callable[..., Any]) -> list[str]:
    """Return the function's named parameters without a default, except those that every row has."""
    parameters = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in named and each.default is each.empty and each.name not in ALWAYS]


def load_module(file: Path) -> ModuleType:
    """Run the file as a separate module. An importer would write a cache beside the file, and read a stale one."""
    module = ModuleType(f"reward file {file}")  # a name that no import statement can use
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look names up here
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except FileNotFoundError as error:
        if error.filename != str(file):
            raise failed(file, error) from error
        raise StageFailed("config", f"{file}: found no file, expected a Python file", "paths are relative to pipelines.yaml") from error
    except (Exception, SystemExit) as error:
        raise failed(file, error) from error
    return module


def failed(file: Path, error: BaseException) -> StageFailed:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{file}:{line}" if line else str(file)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    hint = "correct it"
    if isinstance(error, ImportError):
        hint = "it can import what its stage's runtime holds, but no files beside it: only its own content is in the key"
    details = "".join(traceback.format_exception(error))
    return StageFailed("config", f"{place}: the file does not load: {type(error).__name__}: {text}", hint, details)
