"""Files and commands of other tools, as jobs: the tool, what it does, its keys with their lines, and how it is started."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneline.config.hints import tool_of
from tuneline.config.other_tools import IMPORTED
from tuneline.config.yaml_source import YamlDocument, read
from tuneline.errors import ConfigError
from tuneline.imports.launch import environment_of, launch_of
from tuneline.imports.shell import Command, Script, Word, read_script
from tuneline.imports.texts import EXPECTED, HINT, read_text, wrong
from tuneline.imports.translation import Given, Job, exists
from tuneline.imports.values import plain

SWIFT = ("sft", "rlhf", "pt", "export")
VERL = {"main_ppo": "ppo", "fsdp_sft_trainer": "sft", "sft_trainer": "sft"}
NESTED = ("ROLL", "axolotl")  # tools whose keys are paths: `trl.beta`


def read_jobs(sources: Sequence[str], target: Path) -> list[Job]:
    """Read files, or one command that is given in several words. Raises ConfigError if there is nothing to import."""
    files = [Path(source) for source in sources]
    if all(exists(file) for file in files):
        jobs = [job for file in files for job in _file(file, target)]
    elif len(sources) == 1 and not re.search(r"\s", sources[0]):
        raise wrong(sources[0], "found no such file", f"name {EXPECTED}")
    else:
        text = sources[0] if len(sources) == 1 else shlex.join(sources)
        jobs = list(_script(read_script(text, "command"), "command", (Path.cwd(),), target))
    if not jobs:
        raise wrong(sources[0] if files and exists(files[0]) else "command", f"found no command that is known, expected {EXPECTED}", HINT)
    return jobs


def _file(file: Path, target: Path, sets: Sequence[Word] = ()) -> list[Job]:
    folders = (Path.cwd(), file.parent, *list(file.absolute().parent.parents)[:3])
    if file.suffix in (".yaml", ".yml", ".json"):
        return [_from_yaml(read(file, str(file)), folders, target, sets)]
    document = read_text(file)
    return list(_script(read_script(document, str(file)), str(file), folders, target))


def _from_yaml(document: YamlDocument, folders: tuple[Path, ...], target: Path, sets: Sequence[Word] = ()) -> Job:
    tree = document.tree
    if not isinstance(tree, dict):
        raise wrong(f"{document.name}:1:1", f"found no keys, expected {EXPECTED}", HINT)
    tool, _ = tool_of(tree)
    if tool not in IMPORTED:
        known = f"a configuration of {tool}" if tool else "tuneline's own file" if "pipelines" in tree else "keys of no tool that is known"
        raise wrong(f"{document.name}:1:1", f"found {known}, expected {EXPECTED}", HINT)
    given = _flat(tree, document, ()) if tool in NESTED else {key: Given(value, document.keys[(key,)][0]) for key, value in tree.items()}
    for word in sets:
        key, _, value = word.text.removeprefix("--").partition("=")
        given[key] = Given(plain(value), word.line)
    return Job(tool, "export" if "export_dir" in given else "train", given, document.name, folders, target)


def _flat(tree: dict[str, Any], document: YamlDocument, path: tuple[str, ...]) -> dict[str, Given]:
    """Return the values of a tree by dotted key; an empty mapping is a value."""
    given: dict[str, Given] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            given |= _flat(value, document, here)
        else:
            given[".".join(here)] = Given(value, document.keys.get(here, (0, 0))[0])
    return given


# --- commands ---------------------------------------------------------------------------------------------------------


def _script(script: Script, name: str, folders: tuple[Path, ...], target: Path) -> Iterator[Job]:
    """Yield a job for each command of a tool that is known; of a script with none, one for its variables and Python programs."""
    found, refused = False, list[ConfigError]()
    for command in script.commands:
        exported = {
            key: words[0]
            for key, words in script.variables.items()
            if key in ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES") and words
        }
        command = Command(command.words, exported | command.environment)
        try:
            jobs = list(_command(command, name, folders, target))
        except ConfigError as error:  # a command that does something else, such as `swift infer` after a training
            refused.append(error)
            continue
        found = found or bool(jobs)
        yield from jobs
    if refused and not found:
        raise refused[0]
    if not found and (given := _of_own_script(script)):
        starts = [command for command in script.commands if any(text.endswith(".py") for text in command.texts)]
        launch = launch_of(starts[-1] if starts else Command((), {key: words[0] for key, words in script.variables.items() if words}))
        yield Job("the script", "train", given, name, folders, target, launch)


def _command(command: Command, name: str, folders: tuple[Path, ...], target: Path) -> Iterator[Job]:
    texts = command.texts
    common: dict[str, Any] = {
        "name": name,
        "folders": folders,
        "target": target,
        "launch": launch_of(command),
        "environment": environment_of(command),
    }
    programs = [Path(text).name if "/" in text else text for text in texts]
    for i, program in enumerate(programs):
        after = command.words[i + 1 :]
        if program in ("llamafactory-cli", "lmf") and after:
            yield from _llamafactory(after, common)
            return
        if (program == "swift" and after and after[0].text in SWIFT) or (program.removesuffix(".py") in SWIFT and "swift/cli" in texts[i]):
            action = after[0].text if program == "swift" else program.removesuffix(".py")
            yield Job("ms-swift", action, flags(after[1:] if program == "swift" else after), **common)
            return
        if program in ("swift", "megatron") and after and not after[0].text.startswith("-"):
            found = f"found `{program} {after[0].text}`, expected swift {', '.join(SWIFT)}"
            raise wrong(f"{name}:{after[0].line}:1", found, "tuneline has no Megatron, no chat and no server: docs/importing.md")
        if texts[i].startswith("verl.trainer.") and texts[i].rpartition(".")[2] in VERL:
            yield Job("verl", VERL[texts[i].rpartition(".")[2]], overrides(after), **common)
            return
        if program == "axolotl" or texts[i].startswith("axolotl.cli"):
            yield from _named_file(after, common, (".yaml", ".yml"))
            return
        if program.startswith("start_") and program.endswith("pipeline.py"):
            given = flags(after)
            path, config = (str(given[key].value) if key in given else "" for key in ("config_path", "config_name"))
            yield from _named_file((Word(f"{path}/{config}.yaml", command.words[i].line),), common, (".yaml",))
            return
    if sum(text.startswith("actor_rollout_ref.") and "=" in text for text in texts) >= 2:
        yield Job("verl", "ppo", overrides(command.words), **common)


def _llamafactory(after: Sequence[Word], common: dict[str, Any]) -> Iterator[Job]:
    action = after[0].text
    if action not in ("train", "export"):
        found = f"found `llamafactory-cli {action}`, expected train or export"
        hint = "an artifact is a folder that vLLM and transformers load: `tuneline show` prints it"
        raise wrong(f"{common['name']}:{after[0].line}:1", found, hint)
    if len(after) > 1 and after[1].text.endswith((".yaml", ".yml", ".json")):
        yield from _named_file(after[1:], common, (".yaml", ".yml", ".json"))
        return
    yield Job("LLaMA-Factory", action, flags(after[1:]), **common)


def _named_file(words: Sequence[Word], common: dict[str, Any], suffixes: tuple[str, ...]) -> Iterator[Job]:
    """Yield the job of the YAML file that a command names, with the settings behind it."""
    at = next((i for i, word in enumerate(words) if word.text.endswith(suffixes)), None)
    if at is None:
        raise wrong(
            common["name"], "found no configuration file in the command, expected one", "name the file itself: `tuneline import FILE`"
        )
    paths = [folder / words[at].text for folder in common["folders"]]
    file = next((path for path in paths if exists(path)), None)
    if file is None:
        raise wrong(
            f"{common['name']}:{words[at].line}:1",
            f"found no file `{words[at].text}`",
            "run the import in the folder where the command runs",
        )
    after = words[at + 1 :]
    sets = [word for word in after if "=" in word.text]
    (job,) = _file(file, common["target"], sets)
    job.launch, job.environment = common["launch"], common["environment"]
    yield job


def flags(words: Sequence[Word]) -> dict[str, Given]:
    """Return `--key value ...` as keys: true without a value, a list with several."""
    given: dict[str, Given] = {}
    key, line, values = "", 0, list[Any]()
    for word in (*words, Word("--", 0)):
        if not word.text.startswith("--"):
            values.append(plain(word.text))
            continue
        if key:
            given[key] = Given(True if not values else values[0] if len(values) == 1 else values, line)
        name, equals, value = word.text[2:].partition("=")
        key, line, values = name.replace("-", "_"), word.line, [plain(value)] if equals else []
    return given


def overrides(given_words: Sequence[Word]) -> dict[str, Given]:
    """Return Hydra's overrides `a.b=c`, `+a.b=c`, `~a.b` as keys."""
    given: dict[str, Given] = {}
    for item in given_words:
        key, equals, value = item.text.lstrip("+~").partition("=")
        if equals and re.fullmatch(r"[\w.@/]+", key):
            given[key] = Given(plain(value), item.line)
    return given


def _of_own_script(script: Script) -> dict[str, Given]:
    """Return the keys of a hand-written script: its variables in lower case, and the flags of its Python program, which come first."""
    given: dict[str, Given] = {}
    for command in script.commands:
        for i, text in enumerate(command.texts):
            if text.endswith(".py"):
                given |= flags(command.words[i + 1 :])
    values = {str(each.value) for each in given.values()}
    for name, words in script.variables.items():
        if words and name != "HOME" and name.lower() not in given and (not given or words[0].text not in values):
            given[name.lower()] = Given(plain(words[0].text), words[0].line)
    return given
