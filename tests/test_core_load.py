"""Loading pipelines.yaml: good files, and for each bad one the exact message, place and hint."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneline.errors import ConfigError
from tuneline.load import check, in_order, load, with_ancestors
from tuneline.source import parse

ROOT = Path(__file__).parent.parent
GOOD = """\
version: 1
vars: {rank: 16}
pipelines:
  demo:
    stages:
      base:   {kind: model, path: models/base}
      data:   {kind: dataset, sources: [{type: files, path: rows.jsonl}], split: {test: 0.1}}
      sft:    {kind: sft, model: base, dataset: data, lora: {r: "${rank}"}, global_batch_size: 8}
      merged: {kind: merge, adapters: [sft]}
      gptq:   {kind: quantize, model: merged, calibration: data}
      eval:   {kind: evaluate, model: sft, datasets: [data]}
      gate:   {kind: gate, require: [{metric: data/exact_match, of: eval, at_least: 0.5}]}
"""


def load_text(text: str, **options: object) -> object:
    return check(parse(text, "p.yaml"), Path("/project/p.yaml"), **options)  # type: ignore[arg-type]


def test_a_good_file_loads_with_types_kept() -> None:
    pipeline = load_text(GOOD).spec.pipelines["demo"]  # type: ignore[attr-defined]
    assert pipeline.stages["sft"].lora.r == 16
    assert in_order(pipeline) == ["base", "data", "sft", "merged", "gptq", "eval", "gate"]
    assert with_ancestors(pipeline, "merged") == {"merged", "sft", "base", "data"}


@pytest.mark.parametrize("name", ["demo", "lora-sft"])
def test_the_shipped_pipelines_are_valid(name: str) -> None:
    assert load(ROOT / "pipelines.yaml").pipeline(name).stages


# (what to replace, with what, the whole message)
BAD = [
    ('adapters: [sft]', 'adaptors: [sft]', 'p.yaml:9:7: demo.merged.adapters: found nothing, allowed a value (The adapter; its base is found by itself)\n\nhint: add `adapters: ...`\n\np.yaml:9:29: demo.merged.adaptors: found the unknown field `adaptors`, allowed kind, description, needs, retries, timeout, runtime, resources, seed, adapters, dtype, max_shard_size\n\nhint: did you mean `adapters`?'),
    ('kind: merge', 'kind: merg', 'p.yaml:9:7: demo.merged: found `merg`, allowed model, dataset, sft, evaluate, merge, quantize, gate\n\nhint: did you mean `merge`?'),
    ('kind: merge, ', '', 'p.yaml:9:7: demo.merged: found no `kind`, allowed model, dataset, sft, evaluate, merge, quantize, gate\n\nhint: add `kind: ...`'),
    ('r: "${rank}"', 'r: "${rang}"', 'p.yaml:8:65: demo.sft.lora.r: found the unknown variable ${rang}, allowed rank\n\nhint: did you mean `rank`?'),
    ('r: "${rank}"', 'r: 0, lora_alpha: "${rank}"', 'p.yaml:8:65: demo.sft.lora.r: found 0, allowed at least 1'),
    ('r: "${rank}"', 'r: "${rank}", use_dora: yes', "p.yaml:8:86: demo.sft.lora.use_dora: found 'yes', allowed true or false"),
    ('r: "${rank}"', 'r: "${env:RANK}"', 'p.yaml:8:65: demo.sft.lora.r: found ${env:RANK}, allowed only in store and runtimes\n\nhint: a pipeline must not depend on the shell it is started from; use vars and --var'),
    ('of: eval', 'of: evil', 'p.yaml:12:69: demo.gate.require.0.of: found the unknown stage `evil`, allowed another stage: base, data, sft, merged, gptq, eval\n\nhint: did you mean `eval`?'),
    ('model: merged', 'model: data', 'p.yaml:10:39: demo.gptq.model: found `data`, which gives a Dataset, allowed a stage that gives a Model: base, merged'),
    ('model: base', 'model: merged', 'p.yaml:8:7: demo.sft: found a cycle: sft -> merged -> sft\n\nhint: a stage cannot wait for itself'),
    ('model: base', 'model: sft', 'p.yaml:8:34: demo.sft.model: found the stage itself, allowed a stage that gives a Model: base, merged, gptq'),
    ('metric: data/exact_match', 'metric: dita/exact_match', 'p.yaml:12:47: demo.gate.require.0.metric: found `dita/exact_match`, but `eval` scores only data\n\nhint: write `data/exact_match`, say'),
    (', at_least: 0.5', '', 'p.yaml:12:38: demo.gate.require.0: found no condition, allowed exactly one of at_least, at_most, improves_on, not_below'),
    ('at_least: 0.5', 'at_least: 0.5, by: 0.1', 'p.yaml:12:94: demo.gate.require.0.by: found by without improves_on'),
    ('global_batch_size: 8', 'global_batch_size: 9, resources: {micro_batch_size: 4}', 'p.yaml:8:96: demo.sft.global_batch_size: found 9, allowed multiples of 4 (micro_batch_size 4 x 1 process)\n\nhint: change resources.micro_batch_size: it does not change the result'),
    ('split: {test: 0.1}', 'split: {test: 0.6, validation: 0.5}', 'p.yaml:7:82: demo.data.split: found 0.5 + 0.6, allowed a sum below 1'),
    ('split: {test: 0.1}', 'max_length: 64', 'p.yaml:7:87: demo.data.max_length: found max_length without model\n\nhint: name the model whose tokenizer counts: `model: base`'),
    ('path: models/base', 'path: models/base, gguf: x.gguf', 'p.yaml:6:7: demo.base: found path and gguf, allowed exactly one of hub, path, gguf'),
    ('kind: model', 'kind: model, runtime: torhc', 'p.yaml:6:38: demo.base.runtime: found `torhc`, allowed torch\n\nhint: did you mean `torch`?'),
    ('  demo:', '  My Demo:', 'p.yaml:4:3: My Demo: found the name `My Demo`, allowed lower-case letters, digits and dashes, at most 63'),
    ('vars: {rank: 16}', 'vars: {rank: 16, spare: 1}', 'p.yaml:2:18: vars.spare: found the variable `spare`, used nowhere\n\nhint: remove it, or write ${spare}'),
    ('version: 1', 'version: 7', 'p.yaml:1:10: version: found 7, allowed 1'),
    ('version: 1\n', '', 'p.yaml:1:1: version: found nothing, allowed a value (Version of this file format)\n\nhint: add `version: ...`'),
    ('type: files', 'type: fils', 'p.yaml:7:41: demo.data.sources.0: found `fils`, allowed files, hub, reasoning_gym, code\n\nhint: did you mean `files`?'),
    ('adapters: [sft]', 'adapters: []', 'p.yaml:9:39: demo.merged.adapters: found nothing in it, allowed at least 1'),
    ('adapters: [sft]', 'adapters: [sft], max_shard_size: 5 GB', "p.yaml:9:62: demo.merged.max_shard_size: found '5 GB', allowed text of the form ^\\d+(\\.\\d+)?(MB|GB)$"),
    ('calibration: data', 'calibration: data, bits: 5', 'p.yaml:10:72: demo.gptq.bits: found 5, allowed 2, 3, 4, 8'),
    ('global_batch_size: 8', 'learning_rate: fast', "p.yaml:8:92: demo.sft.learning_rate: found 'fast', allowed a number"),
    ('global_batch_size: 8', 'max_steps: 4.5', 'p.yaml:8:88: demo.sft.max_steps: found 4.5, allowed a whole number'),
    ('rows.jsonl', 'rows.jsonl, kolumns: {}', 'p.yaml:7:73: demo.data.sources.0.kolumns: found the unknown field `kolumns`, allowed type, path, format, columns, on_bad_row\n\nhint: did you mean `columns`?'),
    ('version: 1', 'version: 1\nversion: 1', 'p.yaml:2:1: version: found `version` twice, first in line 1\n\nhint: keep one of them'),
    ('version: 1', 'version: !!python/name:os.system 1', 'p.yaml:1:10: version: found the tag !!python/name:os.system, allowed plain YAML without tags\n\nhint: remove the tag'),
    ('vars:', '\tvars:', "p.yaml:2:1: this is not YAML: found character '\\t' that cannot start any token\n\nhint: YAML is indented with spaces, not tabs"),
    ('adapters: [sft]', 'adapters: [sft], resources: {gpus: 2}', 'p.yaml:9:57: demo.merged.resources: found 2 processes for merge, allowed one\n\nhint: only trainings run in several processes: write `gpus: 1`'),
    (GOOD, '', 'p.yaml:1:1: the file is empty\n\nhint: `tuneline init` in an empty folder writes a file to start from'),
    (GOOD, '- a\n- b\n', 'p.yaml:1:1: found list, allowed a mapping with version, pipelines, ...'),
    (GOOD, 'a: &a [*a]\n', 'p.yaml:1:4: a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0: found more than 40 levels\n\nhint: write the file with fewer aliases'),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[f"{i}-{new[:20]!r}" for i, (_, new, _) in enumerate(BAD)])
def test_a_bad_file_is_refused_with_place_and_hint(old: str, new: str, message: str | None) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(ConfigError, match=r"p\.yaml:\d+:\d+: ") as caught:
        load_text(text)
    if message is not None:
        assert str(caught.value) == message


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = GOOD.replace("kind: model", "kind: modle").replace("model: merged", "model: mergd").replace("at_least: 0.5", "at_lest: 0.5")
    with pytest.raises(ConfigError, match="modle") as caught:
        load_text(text)
    places = [problem.place for problem in caught.value.problems]
    assert [place.rsplit(":", 1)[0] for place in places] == ["p.yaml:6", "p.yaml:10", "p.yaml:12"]


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="values once aliases are expanded"):
        parse("\n".join(lines), "p.yaml")


FLAGS = [
    (["sft.lora.r=x"], [], "--set sft.lora.r: demo.sft.lora.r: found 'x', allowed a whole number"),
    (["stf.lora.r=8"], [], "--set stf.lora.r: found an unknown stage `stf`, allowed base, data, sft, merged, gptq, eval, gate\n\nhint: did you mean `sft`?"),
    (["sft.lora"], [], "--set sft.lora: found no value to set, allowed stage.field=value"),
    (["data.sources.7.path=x"], [], "--set data.sources.7.path: found `7` for a place in a list of 1\n\nhint: places count from 0"),
    ([], ["rang=8"], "--var rang: found an unknown variable, allowed rank\n\nhint: did you mean `rank`?"),
    ([], ["rank"], "--var rank: found no `=`, allowed name=value"),
]  # fmt: skip


@pytest.mark.parametrize(("sets", "variables", "message"), FLAGS, ids=[str(flag[:2]) for flag in FLAGS])
def test_a_bad_flag_is_refused_in_its_own_name(sets: list[str], variables: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="--") as caught:
        load_text(GOOD, pipeline="demo", sets=sets, variables=variables)
    assert str(caught.value) == message


def test_overrides_change_what_they_name() -> None:
    loaded = load_text(
        GOOD, pipeline="demo", sets=["sft.resources.gpus=1", "data.sources.0.path=b.csv", "sft.learning_rate=3e-5"], variables=["rank=4"]
    )
    stages = loaded.spec.pipelines["demo"].stages  # type: ignore[attr-defined]
    assert (stages["sft"].lora.r, stages["sft"].resources.gpus, stages["sft"].learning_rate) == (4, 1, 3e-5)
    assert stages["data"].sources[0].path == "b.csv"


def test_env_is_for_the_store_and_a_dollar_can_be_escaped() -> None:
    text = GOOD.replace("version: 1", 'version: 1\nstore: "${env:PLACE}/store"').replace("split: {test: 0.1}", 'system: "say $${x}"')
    loaded = load_text(text, environment={"PLACE": "/big"})
    assert loaded.spec.store == "/big/store"  # type: ignore[attr-defined]
    assert loaded.spec.pipelines["demo"].stages["data"].system == "say ${x}"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="but PLACE is not set"):
        load_text(text, environment={})


@given(st.data())
def test_a_mutated_file_loads_or_is_refused_with_a_place(data: st.DataObject) -> None:
    """Characters cut out, doubled or replaced: never a traceback, never an error without a place."""
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(st.text("{}[]:,-&*!'\"$ \n\tabz019.~#%", max_size=4)) + text[at + length :]
    places = []
    try:
        load_text(text)
    except ConfigError as error:
        places = [problem.place for problem in error.problems]
    assert all(place.startswith("p.yaml:") for place in places)
