"""Apply --set, --var and ${variables} to the tree of a pipelines.yaml, before its types are checked.

`${name}` takes a value from `vars:`; if it is the whole value, its type is kept. `${env:NAME}` is only allowed in fields that
depend on the machine. `$${` is a plain `${`. There is no other templating.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuneline.config.yaml_source import Keys, YamlDocument, dotted, parse
from tuneline.errors import ConfigError, Problem
from tuneline.secrets import FROM_ENVIRONMENT, named_in
from tuneline.wording import listed, nearest

VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[^{}]*)(?P<end>\}?)")
MACHINE_FIELDS = ("store", "pools", "runtimes")


class Overrides:
    def __init__(self, source: YamlDocument, environment: Mapping[str, str]):
        self.source, self.environment = source, environment
        self.problems: list[Problem] = []
        self.origins: dict[Keys, str] = {}  # values that come from a variable: its name
        self.unresolved: set[Keys] = set()  # values with an unknown variable: reported once, whatever their type is
        declared = source.tree.get("vars")
        self.declared: dict[str, Any] = declared if isinstance(declared, dict) else {}

    def applied(self, pipeline: str | None, sets: Sequence[str], variables: Sequence[str]) -> Any:
        """Return the tree with overrides and variables applied. Fills `problems` and `source.flags`."""
        used = {match["name"] for key, value in self.source.tree.items() if key != "vars" for match in _named(value)}
        self._set_variables(variables)
        self._set_fields(pipeline, sets)
        self._plain_variables()
        tree = self._substitute(self.source.tree, ())
        for name in self.declared:
            if name not in used and not self.unresolved:
                self._problem(
                    ("vars", name), f"found the variable `{name}`, which is not used", "remove it, or use it as ${" + name + "}", True
                )
        return tree

    def _problem(self, path: Keys, message: str, hint: str = "", at_key: bool = False) -> None:
        self.problems.append(Problem(dotted(path), message, hint, place=self.source.place(path, at_key)))

    def _flag(self, flag: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem("", message, hint, place=flag))

    # --- the command line -------------------------------------------------------------------------------------------

    def _set_variables(self, variables: Sequence[str]) -> None:
        for text in variables:
            name, equals, value = text.partition("=")
            flag = f"--var {name}"
            if not equals:
                self._flag(flag, "found no `=`, expected name=value")
            elif name not in self.declared:
                self._flag(flag, f"found an unknown variable, expected {listed(self.declared)}", nearest(name, self.declared))
            else:
                self._put(self.declared, name, flag, value, ("vars", name))

    def _set_fields(self, pipeline: str | None, sets: Sequence[str]) -> None:
        stages = self.source.tree
        for key in ("pipelines", pipeline, "stages"):
            stages = stages.get(key) if isinstance(stages, dict) else None
        if not isinstance(stages, dict):
            return  # the pipeline itself is invalid, which is reported elsewhere
        assert pipeline is not None
        for text in sets:
            name, equals, value = text.partition("=")
            flag = f"--set {name}"
            parts = name.split(".")
            if not equals:
                self._flag(flag, "found no `=`, expected stage.field=value")
            elif len(parts) < 2:
                self._flag(flag, "found no field, expected stage.field=value")
            elif parts[0] not in stages:
                self._flag(flag, f"found the unknown stage `{parts[0]}`, expected {listed(stages)}", nearest(parts[0], stages))
            else:
                keys, node = self._descend(stages, parts, flag)
                if node is not None:
                    self._put(node, keys[-1], flag, value, ("pipelines", pipeline, "stages", *keys))

    def _descend(self, node: Any, parts: list[str], flag: str) -> tuple[list[str | int], Any]:
        """Return the keys and the container of the last part. Creates missing mappings on the way."""
        keys: list[str | int] = []
        for i, part in enumerate(parts):
            key: str | int = part
            if isinstance(node, list):
                if not re.fullmatch("[0-9]{1,6}", part) or int(part) >= len(node):
                    allowed = f"expected 0 to {len(node) - 1}" if node else "but the list is empty"
                    self._flag(flag, f"found `{part}` as a list index, {allowed}", "to replace the whole list, write `=[a, b]`")
                    return keys, None
                key = int(part)
            elif not isinstance(node, dict):
                self._flag(flag, f"found a field under `{'.'.join(parts[:i])}`, which is a plain value")
                return keys, None
            keys.append(key)
            if i < len(parts) - 1:
                if isinstance(node, dict) and node.get(part) is None:
                    node[part] = {}
                node = node[key]
        return keys, node

    def _put(self, node: Any, key: str | int, flag: str, text: str, path: Keys) -> None:
        if secret := named_in(text, self.environment):
            message = f"found the value of {secret}, expected no secrets: Prefect shows the parameters of a run"
            self._flag(flag, message, FROM_ENVIRONMENT)
            return
        try:
            node[key] = parse(text, flag).tree if text.strip() else ""
            self.source.flags[path] = flag
        except ConfigError as error:
            self.problems += [Problem("", problem.message, problem.hint, place=flag) for problem in error.problems]

    # --- variables --------------------------------------------------------------------------------------------------

    def _plain_variables(self) -> None:
        for name, value in self.declared.items():
            if any(True for _ in _named(value)):
                self._problem(("vars", name), f"found '{value}', expected a value without ${{...}}", "write out the value")

    def _substitute(self, node: Any, path: Keys) -> Any:
        if isinstance(node, dict):
            return {key: value if (path, key) == ((), "vars") else self._substitute(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self._substitute(item, (*path, i)) for i, item in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        whole = VARIABLE.fullmatch(node)
        if whole and whole["end"]:
            return self._variable(whole["name"], path)
        return VARIABLE.sub(lambda match: self._text(match, path), node)

    def _text(self, match: re.Match[str], path: Keys) -> str:
        if match["name"] is None:
            return "${"
        if not match["end"]:
            self.unresolved.add(path)
            self._problem(path, f"found `{match[0][:40]}` without its `}}`", "add the `}`, or write `$${` for a plain `${`")
            return ""
        value = self._variable(match["name"], path)
        return value if isinstance(value, str) else json.dumps(value)

    def _variable(self, name: str, path: Keys) -> Any:
        if name.startswith("env:"):
            name = name.removeprefix("env:")
            if path[0] not in MACHINE_FIELDS:
                self.unresolved.add(path)
                hint = "use `vars:` and `--var`: a pipeline must not depend on the environment"
                self._problem(path, f"found ${{env:{name}}}, expected only in {', '.join(MACHINE_FIELDS)}", hint)
            elif name not in self.environment:
                self.unresolved.add(path)
                self._problem(path, f"found ${{env:{name}}}, but {name} is not set", f"export {name}=...")
            return self.environment.get(name, "")
        if name not in self.declared:
            self.unresolved.add(path)
            hint = nearest(name, self.declared) or "declare it under `vars:`"
            self._problem(path, f"found the unknown variable ${{{name}}}, expected {listed(self.declared)}", hint)
            return None
        if self.declared[name] is None or isinstance(self.declared[name], dict | list):
            self.unresolved.add(path)  # reported where the variable is declared
        self.origins[path] = name
        return self.declared[name]


def as_sets(overrides: Mapping[str, Any]) -> list[str]:
    """Convert overrides from Prefect's parameters to the form of the command line. JSON is valid YAML."""
    return [f"{name}={json.dumps(value)}" for name, value in overrides.items()]


def as_overrides(flag: str, sets: Sequence[str]) -> dict[str, Any]:
    """Convert `name=value` to Prefect's parameters. Raises ConfigError for a value that is not YAML."""
    found = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError([Problem("", "found no `=`, expected name=value", place=f"{flag} {name}")])
        found[name] = parse(value, f"{flag} {name}").tree if value.strip() else ""
    return found


def as_flags(overrides: Sequence[str]) -> list[str]:
    """Convert overrides of a loaded file or a run record to the words of the command line."""
    parts = [("--var", text.removeprefix("--var ")) if text.startswith("--var ") else ("--set", text) for text in overrides]
    return [word for part in parts for word in part]


def _named(node: Any) -> Iterator[re.Match[str]]:
    """Yield every ${name} below `node`."""
    if isinstance(node, str):
        yield from (match for match in VARIABLE.finditer(node) if match["name"] is not None)
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _named(item)
