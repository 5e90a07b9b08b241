"""Add an imported pipeline to a pipelines.yaml that exists, as text, so that comments and layout stay."""

from __future__ import annotations

from pathlib import Path

import yaml

from tuneline.config.load import check
from tuneline.config.yaml_source import YamlDocument, parse, read
from tuneline.errors import ConfigError, Problem
from tuneline.files import write_atomically
from tuneline.imports.compose import Draft, pipeline_text, whole_file


def add_to_file(draft: Draft, file: Path) -> None:
    """Add the pipeline to `file`, or create it. Raises ConfigError for a name that exists, and a layout that does not allow it."""
    if not file.exists():
        write_atomically(file, whole_file(draft))
        return
    source = read(file, str(file))
    before = check(source, file.absolute())
    if draft.name in before.spec.pipelines:
        found = f"found the pipeline `{draft.name}` already"
        place = source.place(("pipelines", draft.name), at_key=True)
        raise ConfigError([Problem("", found, "choose another name with `--name`", place=place)])
    text = file.read_bytes().decode("utf-8-sig")
    added = _inserted(text, draft, source)
    after = parse(added, f"{file} with the import")
    check(after, file.absolute())
    if {**source.tree, "pipelines": {**source.tree["pipelines"], draft.name: after.tree["pipelines"].get(draft.name)}} != after.tree:
        raise _layout(source)
    mode = file.stat().st_mode
    write_atomically(file.resolve(), ("\ufeff" if file.read_bytes().startswith(b"\xef\xbb\xbf") else "") + added)
    file.chmod(mode)


def _inserted(text: str, draft: Draft, source: YamlDocument) -> str:
    """Return the text with the pipeline behind the last one."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    assert document is not None  # it has been read
    pipelines = next(value for key, value in document.value if key.value == "pipelines")
    if not isinstance(pipelines, yaml.MappingNode) or pipelines.flow_style or "\t" in text[: pipelines.start_mark.index]:
        raise _layout(source)
    key, value = pipelines.value[0]
    indent = key.start_mark.column
    step = value.start_mark.column - indent if isinstance(value, yaml.MappingNode) and not value.flow_style else 2
    end = _end(pipelines)
    if text[:end].rpartition("\n")[2]:  # behind the rest of the line, which may be a comment
        line_end = text.find("\n", end)
        end = len(text) if line_end < 0 else line_end + 1
    newline = "\r\n" if "\r\n" in text else "\n"
    block = pipeline_text(draft, " " * indent, " " * max(1, step)).replace("\n", newline)
    head = text[:end] if text[:end].endswith("\n") else text[:end] + newline
    return head + newline + block + text[end:]


def _end(node: yaml.Node) -> int:
    """Return the offset behind the last value in a node; the end of a block itself is behind the comments that follow."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _layout(source: YamlDocument) -> ConfigError:
    found = "found a layout that a pipeline cannot be added to, expected `pipelines:` with one pipeline below the other"
    hint = "print the pipeline with `tuneline import` without `--into`, and copy it into the file"
    return ConfigError([Problem("pipelines", found, hint, place=source.place(("pipelines",), at_key=True))])
