"""Generate docs/pipelines.md, docs/pipelines.schema.json, the yaml in the README and the tables and results in docs/importing.md.

python infra/generate_docs.py            write them
python infra/generate_docs.py --check    exit with 1 if a file is out of date (make lint)
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tuneline.config import pools, spec
from tuneline.config.json_schema import json_schema
from tuneline.imports.compose import whole_file
from tuneline.imports.fates import fate_of, kind_of
from tuneline.imports.importing import TABLES, import_sources
from tuneline.kinds import adapters, dataset, fields, gate, grpo, other_adapters, rewards, sft, trackers
from tuneline.kinds import engine as engines
from tuneline.kinds import sources as data_sources
from tuneline.kinds import stage as stages

MARK = "<!-- coverage -->"
ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    stages.Resources,
    engines.EngineSettings,
    data_sources.FilesSource,
    data_sources.HubSource,
    data_sources.ReasoningGymSource,
    data_sources.CodeSource,
    dataset.Split,
    adapters.Lora,
    other_adapters.AdaLora,
    other_adapters.Vera,
    other_adapters.Oft,
    other_adapters.Ia3,
    sft.EarlyStopping,
    sft.LastAnswers,
    grpo.Rollouts,
    *rewards.REWARDS.values(),
    gate.Requirement,
    trackers.Track,
    trackers.Tensorboard,
    trackers.Wandb,
    trackers.Mlflow,
    trackers.Trackio,
    pools.Schedule,
    pools.ProcessPool,
    pools.DockerPool,
    pools.KubernetesPool,
    pools.Queue,
    pools.Toleration,
)

HEAD = """\
# pipelines.yaml: every kind and field

Generated from `tuneline/config/spec.py` and `tuneline/kinds/` by `make docs`; `make lint` checks it.
The same as a JSON Schema: `tuneline schema`.

A file has `version: 1` and `pipelines:`; each pipeline has `stages:`, each stage a `kind`. A field that takes a *stage* holds
the name of another stage of the same pipeline. `${name}` takes a value from `vars:`, a whole value keeps its type;
`${env:NAME}` is allowed in `store`, `pools` and `runtimes` alone; `$${` is a plain `${`. Paths are relative to the file.
Fields under *every stage*, except `seed`, and under `resources` only change how a stage runs: they are not in its key, and
changing them rebuilds nothing. (One effect: `resources.gpus` decides what `dtype: auto` means, which is in the key.) `seed` and
everything else is in the key, unless it has its default value.
"""


TITLES: dict[type[BaseModel], str] = {
    spec.Spec: "The file",
    spec.Pipeline: "pipelines.NAME",
    spec.Runtime: "runtimes.NAME",
    **{model: f"kind: {kind}" for kind, model in spec.STAGES.items()},
    **{model: re.sub(r"(?<!^)(?=[A-Z])", " ", model.__name__).capitalize() for model in PARTS},
}


def pipelines_page() -> str:
    parts = [HEAD, *(section(model, set()) for model in (spec.Spec, spec.Pipeline, spec.Runtime))]
    absent = [f"`{name}`" for name in stages.ProgramStage.model_fields if name not in stages.Stage.model_fields]
    of_all = f"A gate has no program, and so has no {', '.join(absent[:-1])} or {absent[-1]}."
    parts.append(section(stages.ProgramStage, {"kind"}, of_all, title="Every stage"))
    base = set(stages.ProgramStage.model_fields)
    for model in spec.STAGES.values():
        given = model.model_construct().output_type()  # the default may depend on another field; then the description says so
        parts.append(section(model, base, f"Gives {'an' if given == 'Adapter' else 'a'} {given}."))
    return "\n".join([*parts, *(section(model, set()) for model in PARTS)])


def section(model: type[BaseModel], left_out: set[str], extra: str = "", title: str = "") -> str:
    text = " ".join(part for part in (inspect.cleandoc(model.__doc__ or ""), extra) if part)
    rows = [row(name, field) for name, field in model.model_fields.items() if name not in left_out]
    table = ["| field | takes | default | effect |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {title or TITLES[model]}\n", *([text, ""] if text else []), *table, ""])


def row(name: str, field: Any) -> str:
    default = "required" if field.default is PydanticUndefined else shown(field.default)
    cells = (f"`{name}`", takes(field), default, (field.description or "").replace("\n", " "))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "as below"
    if value is None or value == () or value == {} or value == "":
        return "none"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def takes(field: Any) -> str:
    for item in field.metadata:
        if isinstance(item, fields.Reference | fields.OutsideFile):
            return marked(item)
    bounds = [f"{sign} {getattr(item, name):g}" for item in field.metadata for name, sign in SIGNS.items() if hasattr(item, name)]
    return type_name(field.annotation) + (f", {', '.join(bounds)}" if bounds else "")


def marked(marker: fields.Reference | fields.OutsideFile) -> str:
    if isinstance(marker, fields.OutsideFile):
        return "path"
    return f"stage giving {' or '.join(marker.types)}" if marker.types else "stage"


SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
NAMES = {int: "whole number", float: "number", bool: "true, false", str: "text"}


def type_name(annotation: Any) -> str:
    if annotation in NAMES:
        return NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0]).replace('stage giving', 'stages giving')}"
    if origin is dict:
        return f"mapping of {type_name(arguments[1])}"
    markers = [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, fields.Reference | fields.OutsideFile)]
    if markers:
        return marked(markers[0])
    if arguments:
        names = [type_name(argument) for argument in arguments if argument is not type(None) and not isinstance(argument, fields.Strict)]
        return " or ".join(dict.fromkeys(name for name in names if name))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = TITLES[annotation]
        return f"[{title}](#{re.sub(r'[^a-z0-9 ]', '', title.lower()).replace(' ', '-')})"
    return ""


def readme() -> str:
    """Return the README with the demo's yaml from pipelines.yaml."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pipelines = (ROOT / "pipelines.yaml").read_text(encoding="utf-8")
    demo = re.search(r"^  demo:\n(?:    .*\n|\n)+", pipelines, re.MULTILINE)
    assert demo, "pipelines.yaml has no pipeline `demo`"
    block = f"```yaml\npipelines:\n{demo[0].rstrip()}\n```"
    return re.sub(r"```yaml\npipelines:\n.*?```", lambda _: block, text, count=1, flags=re.DOTALL)


def importing() -> str:
    """Return docs/importing.md with the table of keys of public examples, and those that have no counterpart."""
    keys = json.loads((ROOT / "tests" / "core" / "foreign_keys.json").read_text(encoding="utf-8"))
    rows = ["| tool | keys | uses | translated | no effect | no counterpart |", "|---|--:|--:|--:|--:|--:|"]
    refused = []
    for tool, counts in keys.items():
        fates = {key: kind_of(fate_of(key, TABLES[tool])) for key in counts}
        uses = {kind: sum(count for key, (count, _) in counts.items() if fates[key] == kind) for kind in set(fates.values())}
        total = sum(uses.values())
        shares = [f"{100 * uses.get(kind, 0) / total:.1f} %" for kind in ("translated", "no effect", "refused")]
        rows.append(f"| {tool} | {len(counts)} | {total:,} | {' | '.join(shares)} |")
        names = sorted({key.partition(".")[0] + (".*" if "." in key else "") for key, kind in fates.items() if kind == "refused"})
        refused.append(f"- **{tool}**: {', '.join(f'`{name}`' for name in names)}")
    block = "\n".join([MARK, "", *rows, "", "Keys without a counterpart:", "", *refused, "", MARK])
    text = (ROOT / "docs" / "importing.md").read_text(encoding="utf-8")
    text = re.sub(f"{MARK}.*{MARK}", lambda _: block, text, count=1, flags=re.DOTALL)
    for source, result in (("train.yaml", "llamafactory.yaml"), ("train.sh", "swift.yaml")):
        block = f"```yaml importing/{result}\n{imported_example(text, source)}```"
        text = re.sub(rf"^```yaml importing/{result}\n.*?^```$", lambda _, new=block: new, text, flags=re.MULTILINE | re.DOTALL)
    return text


def imported_example(page: str, source: str) -> str:
    """Return what `tuneline import` makes of an example of the page, beside the files that the page names."""
    blocks = dict(re.findall(r"^```\w+ importing/(\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("data").mkdir()
        for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "data/bookings.jsonl", "data/held_out.jsonl"):
            Path(name).touch()
        for name in (source, "data/dataset_info.json"):
            Path(name).write_text(blocks[name], encoding="utf-8")
        return whole_file(import_sources([source], Path.cwd()))


def main() -> int:
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    files = {"docs/pipelines.md": pipelines_page(), "docs/pipelines.schema.json": schema, "README.md": readme()}
    files["docs/importing.md"] = importing()
    stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text]
    if sys.argv[1:] == ["--check"]:
        for name in stale:
            print(f"{name} is not what the code says; `make docs` writes it")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(files[name], encoding="utf-8")
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
