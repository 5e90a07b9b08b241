"""`tuneline import`: what becomes of the keys of other tools, whole sources, and files that a pipeline is added to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from guide_sources import GUIDES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tuneline.config.aliases import FIELD_ALIASES
from tuneline.config.load import check, load
from tuneline.config.spec import STAGES, Pipeline
from tuneline.config.yaml_source import parse
from tuneline.errors import ConfigError
from tuneline.imports.compose import Draft, whole_file
from tuneline.imports.fates import Joined, Refused, Without, Written, fate_of, kind_of
from tuneline.imports.importing import TABLES, import_sources
from tuneline.imports.into import add_to_file
from tuneline.imports.reading import read_jobs

KEYS: dict[str, dict[str, list[Any]]] = json.loads(Path(__file__).with_name("foreign_keys.json").read_text(encoding="utf-8"))
TEXT_ONLY = ("image", "video", "freeze_vi", "freeze_multi", "freeze_language", "freeze_aligner")  # beginnings of multimodal keys


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def imported(text: str, name: str = "train.sh") -> Draft:
    Path(name).write_text(text, encoding="utf-8")
    return import_sources([name], Path.cwd())


def stages(draft: Draft) -> dict[str, dict[str, Any]]:
    """Return the stages of the text that the draft becomes, which is valid."""
    source = parse(whole_file(draft), "p.yaml")
    check(source, Path("/project/p.yaml"), environment={})
    found: dict[str, dict[str, Any]] = source.tree["pipelines"][draft.name]["stages"]
    return found


def nothing_is_dropped(sources: Iterable[str], draft: Draft) -> None:
    """Check that every key of the sources is a field or a comment."""
    keys = {key for job in read_jobs(list(sources), Path.cwd()) for key in job.given}
    assert keys - draft.used - {note.key for note in draft.notes} == set()


def refusal(text: str, name: str = "train.sh") -> tuple[str, str, str]:
    with pytest.raises(ConfigError) as caught:
        imported(text, name)
    (problem,) = caught.value.problems
    return problem.place, problem.message, problem.hint


# --- the keys of public examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", KEYS)
def test_every_key_of_the_public_examples_has_its_fate(tool: str) -> None:
    assert {key: kind_of(fate_of(key, TABLES[tool])) for key in KEYS[tool]} == {key: fate for key, (_, fate) in KEYS[tool].items()}


def test_nearly_all_uses_of_keys_in_text_examples_are_translated_or_without_effect() -> None:
    shares = {}
    for tool in ("LLaMA-Factory", "ms-swift"):
        uses: Counter[str] = Counter()
        for key, (count, fate) in KEYS[tool].items():
            if not key.startswith(TEXT_ONLY) and not (tool == "ms-swift" and key in ("model_name", "model_author")):  # {{NAME}} in rows
                uses[fate] += count
        shares[tool] = 1 - uses["refused"] / uses.total()
    assert min(shares.values()) > 0.95, shares


@pytest.mark.parametrize("tool", TABLES)
def test_fates_have_reasons_and_fields_of_stages(tool: str) -> None:
    for key, fate in TABLES[tool].items():
        if isinstance(fate, Without | Refused):
            assert fate.reason
            assert not fate.reason.endswith("."), key
        for path in fate.paths if isinstance(fate, Written) else [fate.field] if isinstance(fate, Joined) else []:
            assert path.split(".")[0] in ("base", "data", "train", "merge", "quantize", "evaluate", "pipeline"), key


def test_the_hints_of_validate_and_the_import_name_the_same_field() -> None:
    """The hint for a foreign field names ours in its text; the import writes to it."""
    fields = {name for stage in STAGES.values() for name in stage.model_fields} | set(Pipeline.model_fields)
    different = []
    for tool, table in TABLES.items():
        for key, fate in table.items():
            hint = FIELD_ALIASES["Training"].get(key, "")
            if isinstance(fate, Written) and fate.paths and hint.startswith("write `"):
                written = {name for path in fate.paths for name in path.split(".")[1:]} & fields
                if written and not any(f"{name}" in hint for name in written):
                    different.append((tool, key, hint))
    assert different == []


# --- whole sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_the_examples_of_the_guides_become_valid_pipelines(name: str) -> None:
    guide = GUIDES[name]
    guide.write(Path.cwd())
    draft = import_sources(guide.sources, Path.cwd())
    found = stages(draft)
    assert guide.training in found
    nothing_is_dropped(guide.sources, draft)


def test_the_defaults_of_a_tool_are_written_out() -> None:
    draft = imported("stage: sft\nmodel_name_or_path: a/b\ndataset: c/d\ntemplate: x\n", "lf.yaml")
    sft, data = stages(draft)["sft"], stages(draft)["data"]
    assert (sft["lora"], sft["learning_rate"], sft["num_train_epochs"], sft["seed"]) == ({"r": 8, "lora_alpha": 16}, 5e-5, 3, 42)
    assert (sft["max_length"], sft["global_batch_size"], sft["resources"]["gradient_checkpointing"]) == (2048, 8, True)
    assert data == {
        "kind": "dataset", "model": "base", "sources": [{"type": "hub", "repo": "c/d"}], "dedup": "none", "split": {"test": 0},
        "max_length": 2048, "seed": 42,
    }  # fmt: skip
    swift = stages(imported("swift sft --model a/b --dataset c/d"))["sft"]
    assert swift["lora"] == {"r": 8, "lora_dropout": 0.05}  # alpha is 32 here as well
    assert (swift["learning_rate"], swift["weight_decay"], swift["lr_scheduler_type"]) == (1e-4, 0.1, "cosine")
    assert swift["global_batch_size"] == 16  # ms-swift accumulates up to 16 rows


# fmt: off
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "processes": ("NPROC_PER_NODE=4 swift sft --model a/b --dataset c/d --per_device_train_batch_size 2 --gradient_accumulation_steps 3", {"global_batch_size": 24}),
    "visible devices": ("CUDA_VISIBLE_DEVICES=2,3 NPROC_PER_NODE=2 swift sft --model a/b --dataset c/d", {"resources": {"gpus": 2, "devices": [2, 3], "micro_batch_size": 1, "gradient_checkpointing": True}}),
    "one process on two devices": ("CUDA_VISIBLE_DEVICES=0,1 swift sft --model a/b --dataset c/d", {"resources": {"gpus": 2, "strategy": "device_map", "micro_batch_size": 1, "gradient_checkpointing": True}}),
    "torchrun": ("torchrun --nproc_per_node=2 --nnodes 2 swift/cli/sft.py --model a/b --dataset c/d --gradient_accumulation_steps 1", {"global_batch_size": 4}),
    "both names of the tuner": ("swift sft --model a/b --dataset c/d --tuner_type full", {"method": "full", "learning_rate": 1e-5}),
    "the older name": ("swift sft --model a/b --dataset c/d --train_type full", {"method": "full"}),
    "qlora": ("swift sft --model a/b --dataset c/d --quant_bits 4 --quant_method bnb", {"method": "qlora"}),
    "adalora": ("swift sft --model a/b --dataset c/d --tuner_type adalora --adalora_target_r 4 --max_steps 90 --lora_rank 8 --target_modules q_proj", {"adalora": {"lora_dropout": 0.05, "target_modules": ["q_proj"], "target_r": 4}, "lora": None, "max_steps": 90}),
    "8 bits": ("swift sft --model a/b --dataset c/d --quant_bits 8 --quant_method bnb", {"method": "qlora", "bits": 8}),
    "zero3 with offload": ("NPROC_PER_NODE=2 swift sft --model a/b --dataset c/d --deepspeed zero3_offload", {"resources": {"gpus": 2, "strategy": "zero3", "offload": "all", "micro_batch_size": 1, "gradient_checkpointing": True}}),
    "pretraining": ("swift pt --model a/b --dataset c/d", {"train_on": "all"}),
    "masks": ("swift sft --model a/b --dataset c/d --loss_scale last_round", {"train_on": "completion"}),
    "validation": ("swift sft --model a/b --dataset c/d --split_dataset_ratio 0.1 --eval_steps 20", {"eval_steps": 20}),
    "modules": ("swift sft --model a/b --dataset c/d --target_modules q_proj v_proj", {"lora": {"r": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}}),
    "LLaMA-Factory's flags": ("FORCE_TORCHRUN=1 llamafactory-cli train --stage sft --model_name_or_path a/b --dataset c/d --learning_rate 1e-3", {"learning_rate": 1e-3}),
    "a constant schedule": ("llamafactory-cli train --stage sft --model_name_or_path a/b --dataset c/d --lr_scheduler_type constant --warmup_ratio 0.1", {"lr_scheduler_type": "constant"}),
    "verl's sft": ("torchrun --nproc_per_node=2 -m verl.trainer.fsdp_sft_trainer model.partial_pretrain=a/b model.lora_rank=8 data.train_files=c/d trainer.n_gpus_per_node=2", {"lora": {"r": 8, "lora_alpha": 16}, "global_batch_size": 256}),
    "an axolotl command": ("accelerate launch -m axolotl.cli.train ax.yaml --learning_rate=0.5", {"learning_rate": 0.5, "method": "qlora", "packing": True}),
    "arrays and defaults": ('ARGS=(--model a/b\n --dataset "c/d")\nRANK=${RANK:-4}\nswift sft "${ARGS[@]}" --lora_rank $RANK 2>&1 | tee log', {"lora": {"r": 4, "lora_dropout": 0.05}}),
}
# fmt: on


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_become_the_same_training(case: str) -> None:
    text, expected = COMMANDS[case]
    axolotl = "base_model: a/b\nadapter: qlora\nload_in_4bit: true\nsequence_len: 64\nsample_packing: true\ndatasets: [{path: c/d}]\n"
    Path("ax.yaml").write_text(axolotl, encoding="utf-8")
    sft = stages(imported(text))["sft"]
    assert {key: sft.get(key) for key in expected} == expected
    assert ("warmup_steps" in sft) == (case in ("verl's sft", "an axolotl command"))  # those have one by default


def test_a_command_may_be_given_in_words_or_as_one_text() -> None:
    words = "swift sft --model a/b --dataset c/d#5".split()
    assert whole_file(import_sources(words, Path.cwd())) == whole_file(import_sources([" ".join(words)], Path.cwd()))


def test_datasets_of_llama_factory_are_looked_up() -> None:
    Path("data").mkdir()
    Path("data/rows.json").write_text("[]")
    chats = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "tools"}}
    turns = {
        "file_name": "rows.json",
        "formatting": "openai",
        "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "user_tag": "me"},
    }
    info = {
        "turns": turns,
        "chats": chats,
        "hub": {"hf_hub_url": "a/b", "subset": "en", "split": "test"},
        "seen": {"file_name": "x.json", "columns": {"images": "i"}},
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    draft = imported("model_name_or_path: a/b\nstage: sft\ndataset: chats,turns,hub,seen,gone\nfinetuning_type: lora\n", "lf.yaml")
    assert stages(draft)["data"]["sources"] == [
        {"type": "files", "path": "data/rows.json", "format": "sharegpt", "columns": {"conversations": "talk"}},
        {"type": "files", "path": "data/rows.json", "format": "messages", "columns": {"messages": "talk"}},
        {"type": "hub", "repo": "a/b", "subset": "en", "split": "test"},
        {"type": "files", "path": "data/x.json"},
        {"type": "files", "path": "data/gone.json"},
    ]
    assert draft.missing == ["data/x.json", "data/gone.json"]
    assert "`turns` has names of roles that tuneline does not know (user_tag: me): rename them in the file" in draft.remarks
    assert "`seen` has images: tuneline trains text models only" in draft.remarks
    Path("data/dataset_info.json").write_text("{'chats': 1}")
    broken = imported("model_name_or_path: a/b\nstage: sft\ndataset: chats,turns\nfinetuning_type: lora\n", "lf.yaml").remarks
    assert [remark for remark in broken if "JSON" in remark] == [
        "`data/dataset_info.json` cannot be read as JSON: correct it and import again"
    ]


def test_trackers_are_fields_of_the_pipeline() -> None:
    draft = imported("model_name_or_path: a/b\nstage: sft\ndataset: c/d\nreport_to: [wandb, tensorboard]\n", "lf.yaml")
    text = whole_file(draft)
    if "track" in Pipeline.model_fields:
        assert "    track: {wandb: {}, tensorboard: {}}\n    stages:" in text
    else:
        assert "report_to: wandb, tensorboard (line 4): tuneline has no field `track`" in text


def test_a_training_and_its_exports_are_one_pipeline() -> None:
    Path("train.yaml").write_text("model_name_or_path: a/b\nstage: sft\ndataset: c/d\noutput_dir: saves/x\nfinetuning_type: lora\n")
    Path("merge.yaml").write_text("model_name_or_path: a/b\nadapter_name_or_path: saves/x\nexport_dir: out\nexport_size: 2\n")
    Path("more.yaml").write_text("model_name_or_path: a/b\nstage: sft\ndataset: e/f\nadapter_name_or_path: saves/x\n")
    found = stages(import_sources(["train.yaml", "merge.yaml", "more.yaml"], Path.cwd()))
    assert list(found) == ["base", "data", "sft", "merged", "data-2", "sft-2"]
    assert found["merged"] == {"kind": "merge", "adapters": ["sft"], "max_shard_size": "2GB"}
    assert found["sft-2"]["adapter"] == "sft"
    quantize = "swift export --model a/b --quant_method gptq --quant_bits 4 --dataset c/d"
    found = stages(imported(quantize))
    assert found["quantized"] == {"kind": "quantize", "model": "base", "calibration": "data", "bits": 4, "samples": 256}


def test_rewards_and_engines_of_reinforcement_learning() -> None:
    text = (
        "NPROC_PER_NODE=2 swift rlhf --rlhf_type grpo --model a/b --dataset c/d --reward_funcs accuracy format mine"
        " --reward_weights 1 0.5 2 --external_plugins plugin.py --use_vllm true --vllm_gpu_memory_utilization 0.4"
        " --num_generations 4 --per_device_train_batch_size 3 --deepspeed zero3"
    )
    draft = imported(text)
    grpo = stages(draft)["grpo"]
    assert [(reward.get("type") or reward["function"], reward.get("weight", 1)) for reward in grpo["rewards"]] == [
        ("math_equal", 1), ("format", 0.5), ("mine", 2),
    ]  # fmt: skip
    assert grpo["global_batch_size"] == 12  # 3 x 2 are no whole groups of 4
    assert (grpo["resources"]["strategy"], grpo["rollouts"], grpo["beta"], grpo["loss_type"]) == ("zero2", {"engine": "vllm"}, 0.04, "grpo")
    assert grpo["resources"]["engine"] == {"gpu_memory_utilization": 0.4}


def test_preference_trainings_have_no_dropout_and_their_own_settings() -> None:
    dpo = stages(imported("swift rlhf --rlhf_type dpo --model a/b --dataset c/d --beta 0.2 --rpo_alpha 0.1 --loss_type ipo"))["dpo"]
    assert (dpo["beta"], dpo["rpo_alpha"], dpo["loss_type"], "lora_dropout" in dpo["lora"]) == (0.2, 0.1, "ipo", False)
    kto = stages(imported("stage: kto\nmodel_name_or_path: a/b\ndataset: c/d\npref_beta: 0.3\nkto_rejected_weight: 0.5\n", "lf.yaml"))[
        "kto"
    ]
    assert (kto["beta"], kto["undesirable_weight"]) == (0.3, 0.5)


def test_weights_and_numbers_of_rows_belong_to_sources() -> None:
    draft = imported(
        "model_name_or_path: a/b\nstage: sft\ndataset: c/d,e/f\nmax_samples: 9\nmix_strategy: interleave_over\ninterleave_probs: 0.7,0.3\n",
        "lf.yaml",
    )
    assert stages(draft)["data"]["sources"] == [
        {"type": "hub", "repo": "c/d", "max_rows": 9, "weight": 0.7},
        {"type": "hub", "repo": "e/f", "max_rows": 9, "weight": 0.3},
    ]
    draft = imported("swift sft --model a/b --dataset c/d:en/de#5 hf::e/f --use_hf true")
    assert stages(draft)["data"]["sources"] == [
        {"type": "hub", "repo": "c/d", "subset": "en", "max_rows": 5},
        {"type": "hub", "repo": "c/d", "subset": "de", "max_rows": 5},
        {"type": "hub", "repo": "e/f"},
    ]


def test_files_for_evaluation_become_an_evaluation() -> None:
    found = stages(imported("model_name_or_path: a/b\nstage: sft\ndataset: c/d\neval_dataset: e/f\ndo_predict: true\n", "lf.yaml"))
    assert found["evaluated"] == {"kind": "evaluate", "model": "sft", "datasets": ["held-out"], "resources": {"gpus": 1}}
    assert found["held-out"]["sources"] == [{"type": "hub", "repo": "e/f"}]


# --- comments ---------------------------------------------------------------------------------------------------------


def test_keys_without_counterpart_are_comments_with_their_line_and_what_to_do() -> None:
    draft = imported(
        "model_name_or_path: a/b\nstage: sft\ndataset: c/d\nuse_galore: true\nplot_loss: true\nhub_token: hf_abc\nnew: 1\n", "lf.yaml"
    )
    text = whole_file(draft)
    assert "#   use_galore: true (line 4): this optimizer is not offered" in text
    assert "#   plot_loss: true (line 5): every step is logged" in text
    assert "#   new: 1 (line 7): tuneline has no such setting" in text
    assert "hf_abc" not in text  # a token is never shown


def test_a_field_that_pipelines_yaml_refuses_becomes_a_comment() -> None:
    draft = imported("model_name_or_path: a/b\nstage: sft\ndataset: c/d\nlora_dropout: 3\nlr_scheduler_type: polka\n", "lf.yaml")
    sft = stages(draft)["sft"]
    assert "lora_dropout" not in sft["lora"]
    assert "lr_scheduler_type" not in sft
    assert {note.key for note in draft.notes if isinstance(note.fate, Refused)} == {"lora_dropout", "lr_scheduler_type"}


def test_paths_outside_are_allowed_by_roots(tmp_path: Path) -> None:
    Path("in").mkdir()
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    Path("in/t.sh").write_text(f"swift sft --model {model} --dataset {tmp_path}/rows.jsonl")
    draft = import_sources(["in/t.sh"], tmp_path / "in")
    assert draft.roots == [str(tmp_path / "models"), str(tmp_path)]
    assert stages(draft)["base"]["path"] == str(model)


# --- refusals ---------------------------------------------------------------------------------------------------------

# fmt: off
REFUSED: dict[str, tuple[str, str, str]] = {
    "no tool": ("echo hello\n", "train.sh", "found no command that is known"),
    "empty": ("", "train.sh", "found no command that is known"),
    "a quote": ("swift sft --model 'a/b\n", "train.sh:1:1", "found `'` that is never closed"),
    "another command": ("swift deploy --model a/b\n", "train.sh:1:1", "found `swift deploy`, expected swift sft, rlhf, pt, export"),
    "Megatron": ("megatron sft --model a/b\n", "train.sh:1:1", "found `megatron sft`, expected swift sft, rlhf, pt, export"),
    "no model": ("swift sft --dataset c/d\n", "train.sh:1:1", "found no model in `model`, expected `owner/name` or a folder"),
    "a variable": ("swift sft --model $1 --dataset c/d\n", "train.sh:1:1", "found no model in `model`, expected `owner/name` or a folder"),
    "no dataset": ("swift sft --model a/b\n", "train.sh:1:1", "found no dataset, expected `--dataset`"),
    "a reward model": ("swift rlhf --rlhf_type rm --model a/b --dataset c/d\n", "train.sh:1:1", "found a training by `rm`, expected one of "),
    "an export alone": ("\nswift export --adapters out/checkpoint-1 --merge_lora true\n", "train.sh:2:1", "found an adapter without the training that made it, expected both"),
    "awq": ("swift export --model a/b --quant_method awq\n", "train.sh:1:1", "found `awq`, expected gptq"),
    "ppo": ("python -m verl.trainer.main_ppo actor_rollout_ref.model.path=a/b\n", "train.sh:1:1", "found adv_estimator=gae, expected grpo"),
    "no rewards": ("swift rlhf --rlhf_type grpo --model a/b --dataset c/d --reward_funcs toolbench\n", "train.sh:1:1", "found no reward that has a counterpart"),
    "a missing file": ("llamafactory-cli train gone.yaml\n", "train.sh:1:1", "found no file `gone.yaml`"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_with_a_place_and_a_hint(case: str) -> None:
    text, place, message = REFUSED[case]
    found = refusal(text)
    assert (found[0], found[1][: len(message)]) == (place, message)
    assert found[2]


def test_files_that_are_none_of_other_tools_are_refused() -> None:
    assert "found keys of no tool that is known" in refusal("a: 1\n", "x.yaml")[1]
    assert "found tuneline's own file" in refusal("version: 1\npipelines: {}\n", "x.yaml")[1]
    assert "found a configuration of mergekit" in refusal("merge_method: ties\nmodels: []\nslices: []\n", "x.yaml")[1]
    assert "found no keys" in refusal("- 1\n", "x.yaml")[1]
    assert refusal("a: [\n", "x.yaml")[0] == "x.yaml:2:1"
    Path("binary.sh").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="found bytes that are not UTF-8"):
        import_sources(["binary.sh"], Path.cwd())
    with pytest.raises(ConfigError, match="found a folder, expected a file"):
        import_sources(["."], Path.cwd())
    with pytest.raises(ConfigError, match="found no such file"):
        import_sources(["gone.yaml"], Path.cwd())


# --- files that exist -------------------------------------------------------------------------------------------------

EXISTING = """\
# the first line
version: 1
pipelines:  # all of them
    mine:
        stages:
            base: {kind: model, hub: a/b}  # kept
            # a comment

# the last line
store: .s
"""


def test_a_pipeline_is_added_to_a_file_without_touching_the_rest() -> None:
    file, draft = Path("p.yaml"), imported("swift sft --model a/b --dataset c/d")
    file.write_text(EXISTING)
    add_to_file(draft, file)
    text = file.read_text()
    assert [line for line in EXISTING.splitlines() if line not in text.splitlines()] == []
    assert list(load(file).spec.pipelines) == ["mine", "train"]
    assert text.index("    train:") < text.index("# the last line")
    with pytest.raises(ConfigError, match="found the pipeline `train` already"):
        add_to_file(draft, file)
    assert file.read_text() == text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "text",
    [
        "version: 1\npipelines:\n  a:\n    stages:\n      base:\n        kind: model\n        hub: a/b",
        "version: 1\npipelines:\n a: {stages: {base: {kind: model, hub: a/b}}} # end\n",
        "pipelines:\n  a:\n    description: |\n      two\n      lines\n    stages: {base: {kind: model, hub: a/b}}\nversion: 1\n",
        "pipelines:\n  a:\n    stages: {base: {kind: model, hub: a/b}}\n    description: >\n      folded\n\n\nversion: 1\n",
    ],
)
def test_layouts_that_a_pipeline_is_added_to(text: str, ending: str) -> None:
    file = Path("p.yaml")
    file.write_bytes(text.replace("\n", ending).encode())
    add_to_file(imported("swift sft --model a/b --dataset c/d"), file)
    assert list(load(file).spec.pipelines) == ["a", "train"]
    assert ending == "\n" or b"\n" not in file.read_bytes().replace(b"\r\n", b"")


def test_a_file_in_braces_is_left_as_it_is() -> None:
    Path("p.yaml").write_text(flow := "version: 1\npipelines: {a: {stages: {base: {kind: model, hub: a/b}}}}\n")
    with pytest.raises(ConfigError, match="found a layout that a pipeline cannot be added to"):
        add_to_file(imported("swift sft --model a/b --dataset c/d"), Path("p.yaml"))
    assert Path("p.yaml").read_text() == flow


# --- anything ---------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20),
    st.sampled_from(["a/b", "data.jsonl", "$X", "${a.b}", "[1, 2]", "zero3", "list(range(0,16))", "1e-4", "full", "qlora", "x#5", "~"]),
    st.lists(st.one_of(st.text(max_size=5), st.integers(), st.dictionaries(st.sampled_from(["path", "type", "name", "split"]), st.text(max_size=5)))),
    st.dictionaries(st.text(max_size=5), st.integers()),
)  # fmt: skip
START = {
    "LLaMA-Factory": {"model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "lora", "dataset": "c/d"},
    "axolotl": {"base_model": "a/b", "sequence_len": 64, "micro_batch_size": 1, "adapter": "lora", "datasets": [{"path": "c/d"}]},
    "ROLL": {"pretrain": "a/b", "actor_train": {"data_args": {"file_name": "x.jsonl"}}, "actor_infer": {}, "rollout_batch_size": 4, "adv_estimator": "grpo"},
}  # fmt: skip


def ends_well(*files: str) -> None:
    try:
        draft = import_sources(files, Path.cwd())
    except ConfigError as error:
        assert [problem for problem in error.problems if not problem.place or not problem.message] == []  # noqa: PT017
    else:
        stages(draft)
        nothing_is_dropped(files, draft)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), tool=st.sampled_from(list(START)))
def test_no_configuration_of_another_tool_ends_in_a_traceback(data: st.DataObject, tool: str) -> None:
    table = [key for key in TABLES[tool] if "*" not in key and "[]" not in key]
    keys = data.draw(st.dictionaries(st.sampled_from(table), VALUES, max_size=6))
    tree: dict[str, Any] = {**START[tool], **({key: value for key, value in keys.items() if "." not in key})}
    for key, value in keys.items():
        if "." in key and isinstance(tree.setdefault(key.split(".")[0], {}), dict):
            tree[key.split(".")[0]][key.split(".", 1)[1]] = value
    Path("x.yaml").write_text(json.dumps(tree), encoding="utf-8")
    ends_well("x.yaml")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([
    "swift", "sft", "export", "--model", "a/b", "--dataset", "c/d", "'", '"', "$(", "${", "}", ")", "(", "A=(", "A=1", "$A", "\\\n", "\n", "#", "`",
    "--lora_rank", "8", "llamafactory-cli", "train", "--deepspeed", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.model.path=a/b", ">", "&&",
    "--rlhf_type", "grpo", "--reward_funcs", "accuracy", "LORA_R=4", "x.py", "--", "=", "é", "\x00", "MODEL_PATH=m", "DATA_PATH=d",
]), max_size=25).map(" ".join))  # fmt: skip
@example("a=" + "(" * 200)
@example("swift sft --model a/b --dataset " + "x" * 5000)
def test_no_script_ends_in_a_traceback(text: str) -> None:
    Path("x.sh").write_text(text, encoding="utf-8")
    ends_well("x.sh")
