"""Estimates: exact parameters of public models, invariants for any configuration, published measurements, and the hints of a plan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from estimate_tools import CONFIGS, PIPELINE
from hypothesis import given
from hypothesis import strategies as st
from plan_tools import build, planned

from tuneline.config.load import load
from tuneline.config.spec import STAGES
from tuneline.estimates import fit as fits
from tuneline.estimates.architectures import Architecture, architecture_of, reach, read
from tuneline.estimates.estimate import Estimate, disk_of, estimates
from tuneline.estimates.memory import Job
from tuneline.kinds.adapters import Lora
from tuneline.kinds.sft import SftStage
from tuneline.kinds.training import Training
from tuneline.planning.plan import plan
from tuneline.workspace.checkpoints import Checkpoint
from tuneline.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
GB, GIB = 10**9, 1 << 30


PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Gemma-2B": 2_506_172_416,
    "Qwen-7B": 7_721_324_544,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    folder, found = tmp_path_factory.mktemp("configs"), {}
    for name, fields in CONFIGS.items():
        (folder / name).write_text(json.dumps(fields))
        architecture = read((folder / name).read_bytes())
        assert isinstance(architecture, Architecture)
        found[name] = architecture
    return found


def job(architecture: Architecture, length: int = 1024, method: str = "lora", bits: int = 4, kind: str = "sft", **fields: Any) -> Job:
    """Return a training on one GPU with one row of `length` tokens at a time. `fields` and their `resources` override this."""
    resources = {"gpus": 1, "micro_batch_size": 1, **fields.pop("resources", {})}
    document = {"kind": kind, "model": "base", "dataset": "rows", **fields, "resources": resources}
    stage = STAGES[kind].model_validate_json(json.dumps(document))
    assert isinstance(stage, Training)
    return Job(architecture, stage, length, method, bits)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str, models: dict[str, Architecture]) -> None:
    assert models[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "r", "targets", "count"),
    [
        ("Llama-2-7B", 8, ("q_proj", "v_proj"), 4_194_304),  # the LoRA paper's choice, and what guides call 0.06%
        ("Llama-2-7B", 8, tuple(ATTENTION), 8_388_608),
        ("Llama-2-7B", 64, "all-linear", 159_907_840),  # QLoRA's
        ("Qwen2.5-7B", 16, tuple(ATTENTION), 10_092_544),
        ("Qwen2.5-7B", 16, "all-linear", 40_370_176),
        ("SmolLM2-135M", 16, "all-linear", 4_884_480),  # as PEFT printed it in the demo
    ],
)
def test_an_adapters_parameters_are_counted_by_layer(name: str, r: int, targets: Any, count: int, models: dict[str, Architecture]) -> None:
    assert models[name].adapter_parameters(Lora(r=r, target_modules=targets)) == count


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"model_type": "bert"}', "models of type `bert` are not supported, only llama, mistral"),
        ('{"model_type": "llama", "quantization_config": {}}', "its weights are quantized"),
        ('{"model_type": "llama", "hidden_size": 64, "vocab_size": "many"}', "has no intermediate_size, .*, vocab_size"),
        ("[", "the config.json of base cannot be read: Expecting value"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said_and_not_guessed(text: str, why: str, folder: Path) -> None:
    (folder / "base" / "config.json").write_text(text)
    estimate = plan_of(folder)["sft"]
    assert estimate.memory is estimate.parameters is estimate.disk is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(estimate.unknown)


# --- where the configuration is read ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipelines.yaml").write_text(PIPELINE)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-7B"]))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def plan_of(folder: Path, *sets: str) -> dict[str, Estimate]:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    return estimates(workspace, "demo", plan(workspace, "demo"))


def test_trainings_and_merges_go_by_the_model_at_their_root(folder: Path) -> None:
    found = plan_of(folder)
    assert list(found) == ["sft", "merged", "again"]
    assert found["sft"].parameters == found["merged"].parameters == found["again"].parameters == 7_615_616_512
    assert (found["sft"].device, found["sft"].sequence_length) == ("gpu", 2048)  # the dataset drops longer rows
    assert (found["again"].device, found["again"].sequence_length) == ("cpu", 512)
    assert found["merged"].disk == 2 * 7_615_616_512
    assert plan_of(folder, "merged.dtype=float32")["merged"].disk == 4 * 7_615_616_512


def test_a_fetched_model_is_read_in_the_store_or_in_the_hubs_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PIPELINE.replace("path: base", "hub: owner/name")
    (folder / "pipelines.yaml").write_text(text)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    assert plan_of(folder)["sft"].unknown == "base has not been fetched yet; `--online` asks the hub"
    repository = folder / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    assert plan_of(folder)["sft"].unknown == "base has not been fetched yet; `--online` asks the hub"  # the artifact has only a reference
    (folder / "base" / "config.json").rename(repository / "snapshots" / ("a" * 40) / "config.json")
    assert plan_of(folder)["sft"].parameters == 7_615_616_512
    (folder / "model.gguf").write_text("")
    (folder / "pipelines.yaml").write_text(text.replace("hub: owner/name", "gguf: model.gguf"))
    assert plan_of(folder)["sft"].unknown == "base has not been converted yet"
    row = planned(folder)["base"]
    build(folder)
    artifact = planned(folder)["base"].artifact
    assert row.artifact is None
    assert artifact is not None
    (artifact.payload / "config.json").write_text(json.dumps(CONFIGS["SmolLM2-135M"]))
    rows = planned(folder)
    rows["base"].artifact = artifact  # an extra file breaks the artifact for a plan
    workspace = Workspace(load(folder / "pipelines.yaml"))
    architecture = architecture_of(workspace, workspace.loaded.pipeline("demo").stages, rows, "again")
    assert isinstance(architecture, Architecture)
    assert architecture.parameters == 134_515_008


# --- rules ------------------------------------------------------------------------------------------------------------

SHAPES = st.fixed_dictionaries(
    {
        "length": st.sampled_from([64, 512, 4096]),
        "micro": st.sampled_from([1, 2, 8]),
        "gpus": st.sampled_from([1, 2, 4, 8]),
        "strategy": st.sampled_from(["ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"]),
        "offload": st.sampled_from([None, "optimizer", "all"]),
        "gradient_checkpointing": st.booleans(),
        "r": st.sampled_from([1, 16, 256]),
        "method": st.sampled_from(["lora", "qlora", "full"]),
    }
)


def total(architecture: Architecture, shape: dict[str, Any]) -> int:
    fields = {name: shape[name] for name in ("gpus", "strategy", "offload", "gradient_checkpointing")}
    resources = {**fields, "micro_batch_size": shape["micro"]}
    return (
        job(architecture, shape["length"], shape["method"], lora={"r": shape["r"]}, global_batch_size=64, resources=resources)
        .memory()
        .total
    )


@given(shape=SHAPES, name=st.sampled_from(["SmolLM2-135M", "Qwen2.5-7B", "Qwen2.5-72B"]))
def test_what_costs_more_never_needs_more_memory(shape: dict[str, Any], name: str, models: dict[str, Architecture]) -> None:
    def needs(**changes: Any) -> int:
        return total(models[name], shape | changes)

    now = total(models[name], shape)
    if shape["strategy"] != "ddp" or shape["gpus"] > 1:  # the second process of DDP adds its buckets
        assert needs(gpus=2 * shape["gpus"]) <= now
    assert needs(micro=1) <= now <= needs(length=2 * shape["length"])
    assert needs(gradient_checkpointing=True) <= now <= needs(r=2 * shape["r"])
    assert needs(offload="all") <= needs(offload="optimizer") <= needs(offload=None)
    if shape["strategy"] not in ("zero3", "fsdp"):  # QLoRA's weights are not sharded
        assert needs(method="qlora") <= needs(method="lora")
    assert needs(method="lora", r=1) <= needs(method="full")  # a high rank on a narrow model keeps more activations than the model itself
    for less, more in (("zero1", "zero2"), ("zero2", "zero3")):
        assert needs(strategy=more) <= needs(strategy=less)


def test_what_is_offloaded_is_not_gone(models: dict[str, Architecture]) -> None:
    here = job(models["Qwen2.5-7B"], resources={"strategy": "zero3"}).memory()
    away = job(models["Qwen2.5-7B"], resources={"strategy": "zero3", "offload": "all"}).memory()
    assert away.offloaded == here.weights + here.optimizer
    assert (away.weights, away.optimizer) == (0, 0)


def test_an_engine_on_the_same_gpu_leaves_the_rest(models: dict[str, Architecture]) -> None:
    shared = {"kind": "grpo", "rewards": [{"type": "exact_match"}], "rollouts": {"engine": "vllm"}, "num_generations": 4}
    engine = {"gpus": 0, "gpu_memory_utilization": 0.4}
    training = job(models["Qwen2.5-7B"], resources={"engine": engine}, **shared).stage
    assert fits.room_for(training, "80Gi") == round(0.6 * 80 * GIB)
    apart = job(models["Qwen2.5-7B"], resources={"gpus": 2, "engine": {"gpus": 1}}, **shared).stage
    assert fits.room_for(apart, "80Gi") == 80 * GIB


def test_sampling_by_the_model_itself_is_counted(models: dict[str, Architecture]) -> None:
    fields = {"kind": "grpo", "rewards": [{"type": "exact_match"}], "max_completion_length": 1024, "global_batch_size": 512}
    resources = {"gradient_checkpointing": True}
    own = job(models["Qwen2.5-7B"], 1536, resources=resources, **fields)
    engine = job(models["Qwen2.5-7B"], 1536, resources=resources, rollouts={"engine": "vllm"}, **fields)
    assert own.memory().activations > 512 * 1536 * 2 * 28 * 512 * 2 > engine.memory().activations  # keys and values of all sequences


# --- what others say --------------------------------------------------------------------------------------------------

# Every training of Qwen's table that can be expressed here: total GB over all devices, by tokens of its one row.
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MEASURED: dict[tuple[str, str, str, int], tuple[float, ...]] = {
    ("1.8B", "lora", "ddp", 1): (6.7, 7.4, 8.4, 11.0, 16.2, 21.8),
    ("7B", "lora", "ddp", 1): (20.1, 20.4, 21.5, 23.8, 29.7, 36.6),
    ("7B", "lora", "zero2", 4): (74.7, 77.6, 84.9, 95.1, 121.1, 155.5),
    ("14B", "lora", "ddp", 1): (34.6, 35.1, 35.3, 37.4, 42.5, 55.2),
    ("72B", "lora", "zero3", 4): (215.4, 217.7, 222.6, 228.8, 249.0, 289.2),
    ("1.8B", "full", "zero3", 1): (43.5, 43.5, 43.5, 43.5, 47.1, 48.3),
    ("7B", "full", "zero3", 2): (139.2, 148.0, 162.0),
    ("1.8B", "qlora", "ddp", 1): (5.8, 6.0, 6.6, 7.8, 10.2, 15.8),
    ("7B", "qlora", "ddp", 1): (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
    ("14B", "qlora", "ddp", 1): (18.7, 18.4, 18.9, 19.9, 23.0, 27.9),
    ("72B", "qlora", "ddp", 1): (61.4, 61.4, 62.9, 64.1, 68.0, 75.6),
}
LOGITS = 12  # bytes of each logit, all of which those runs held: in its type, in float32, and a gradient; our reading, not theirs
WORST = {"lora": (-0.11, 0.10), "full": (-0.22, 0.05), "qlora": (-0.22, 0.34)}


@pytest.mark.parametrize(("size", "method", "strategy", "devices"), MEASURED)
def test_the_errors_against_qwens_measurements_are_those_that_the_page_states(
    size: str, method: str, strategy: str, devices: int, models: dict[str, Architecture]
) -> None:
    measured = MEASURED[size, method, strategy, devices]
    name, cells = f"Qwen-{size}", []
    for length, figure in zip(LENGTHS, measured, strict=False):
        resources = {"gradient_checkpointing": True, "gpus": devices, "strategy": strategy}
        training = job(models[name], length, method, lora={"r": 64}, global_batch_size=8, resources=resources)
        estimated = (training.memory().total + LOGITS * length * models[name].vocab_size) * devices / GB
        error = estimated / figure - 1
        assert WORST[method][0] <= round(error, 2) <= WORST[method][1]
        cells.append(f"{figure:g}: {estimated:.1f}, {error:+.0%}")
    cells += [""] * (len(LENGTHS) - len(cells))
    line = f"| {size}, {method} | {strategy}, {devices} | {' | '.join(cells)} |"
    assert line in (ROOT / "docs" / "estimates.md").read_text(encoding="utf-8"), line


LLAMA_FACTORY = {"length": 1024, "lora": {"r": 8}, "resources": {"gradient_checkpointing": True}}
CHECKPOINTING = {"resources": {"gradient_checkpointing": True}}
# What, where it is from, GB, model, training.
FIGURES: list[tuple[str, str, float, str, dict[str, Any]]] = [
    ("7B, full, bf16", "lora-scripts guide", 28, "Qwen2.5-7B", {"method": "full", **CHECKPOINTING}),
    ("7B, LoRA r=16", "lora-scripts guide", 16, "Qwen2.5-7B", {"lora": {"r": 16, "target_modules": ATTENTION}, **CHECKPOINTING}),
    ("7B, LoRA r=8", "lora-scripts guide", 14, "Qwen2.5-7B", {"lora": {"r": 8, "target_modules": ATTENTION}, **CHECKPOINTING}),
    ("7B, LoRA, 8 bit", "lora-scripts guide", 10, "Qwen2.5-7B", {"method": "qlora", "bits": 8, **LLAMA_FACTORY}),
    ("7B, LoRA r=8, batch 4", "LLaMA-Factory guide", 24, "Llama-2-7B",
     {"lora": {"r": 8}, "resources": {"gradient_checkpointing": True, "micro_batch_size": 4}}),
    ("7B, full", "LLaMA-Factory guide: 80 and more", 80, "Llama-2-7B", {"method": "full", **CHECKPOINTING}),
    ("7B, LoRA", "LLaMA-Factory's table, estimated", 16, "Llama-2-7B", LLAMA_FACTORY),
    ("7B, full", "LLaMA-Factory's table, estimated", 120, "Llama-2-7B", {"method": "full", **LLAMA_FACTORY}),
    ("7B, QLoRA 4 bit", "LLaMA-Factory's table, estimated", 6, "Llama-2-7B", {"method": "qlora", **LLAMA_FACTORY}),
    ("7B, QLoRA 8 bit", "LLaMA-Factory's table, estimated", 10, "Llama-2-7B", {"method": "qlora", "bits": 8, **LLAMA_FACTORY}),
    ("72B, LoRA", "LLaMA-Factory's table, estimated (70B)", 160, "Qwen2.5-72B", LLAMA_FACTORY),
    ("72B, QLoRA 4 bit", "LLaMA-Factory's table, estimated (70B)", 48, "Qwen2.5-72B", {"method": "qlora", **LLAMA_FACTORY}),
    ("65B, QLoRA 4 bit, r=64", "QLoRA (arXiv:2305.14314): below 48", 48, "LLaMA-65B",
     {"method": "qlora", "length": 512, "lora": {"r": 64}, **CHECKPOINTING}),
    ("65B, full", "QLoRA (arXiv:2305.14314): above 780", 780, "LLaMA-65B", {"method": "full", "length": 512, **CHECKPOINTING}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "source", "figure", "name", "fields"), FIGURES)
def test_the_errors_against_others_figures_are_those_that_the_page_states(
    what: str, source: str, figure: float, name: str, fields: dict[str, Any], models: dict[str, Architecture]
) -> None:
    estimated = job(models[name], **fields).memory().total / GB
    line = f"| {what} | {source} | {figure:g} | {estimated:.1f} | {estimated / figure - 1:+.0%} |"
    assert line in (ROOT / "docs" / "estimates.md").read_text(encoding="utf-8"), line


def test_states_are_those_of_zeros_own_table(models: dict[str, Architecture]) -> None:
    """Figure 1 of arXiv:1910.02054: 7.5 billion parameters on 64 devices take 31.4, 16.6 and 1.9 GB in the three stages."""
    of_model = models["Qwen-7B"].parameters / 7.5e9
    for strategy, figure in (("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)):
        resources = {"gpus": 64, "strategy": strategy}
        memory = job(models["Qwen-7B"], method="full", global_batch_size=64, resources=resources).memory()
        assert (memory.weights + memory.gradients + memory.optimizer) / GB / of_model == pytest.approx(figure, rel=0.02)


def test_weights_and_adapters_are_of_the_size_that_others_state(models: dict[str, Architecture]) -> None:
    for name, measured in (("Qwen2.5-0.5B", 0.97), ("Qwen2.5-72B", 136.2)):  # GiB, Qwen2.5's speed benchmark, one token in
        assert job(models[name]).frozen / GIB == pytest.approx(measured, rel=0.06)
    small = job(models["Llama-2-7B"], lora={"r": 8, "target_modules": ["q_proj", "v_proj"]})
    assert small.trainable / small.architecture.parameters == pytest.approx(0.0006, abs=0.00005)  # the guide's 4 million, 0.06%
    assert small.frozen / GB == pytest.approx(14, rel=0.04)  # its base
    assert 4 * small.trainable / GB == pytest.approx(0.0168, rel=0.01)  # its adapter of "30 MB"
    assert disk_of(small) == small.trainable * (3 * 12 + 4)


def test_the_copy_of_a_checkpoint_of_other_processes_is_on_the_disk(models: dict[str, Architecture]) -> None:
    zero = job(models["Qwen2.5-7B"], resources={"strategy": "zero2", "gpus": 2})
    own, other = (Checkpoint(Path("checkpoint-5"), layout) for layout in ("zero2 over 2 processes", "zero2 over 4 processes"))
    assert disk_of(zero) == disk_of(zero, own) == zero.trainable * (3 * 14 + 2)
    assert disk_of(zero, other) == zero.trainable * (2 * 14 + 24)
    plain = job(models["Qwen2.5-7B"])
    assert disk_of(plain, Checkpoint(Path("checkpoint-5"), "replicated")) == disk_of(plain)


# --- advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "gpus", "advice"),
    [
        (100, 8, "`--set sft.resources.micro_batch_size=4`"),
        (25, 8, "--set sft.resources.gradient_checkpointing=true --set sft.resources.micro_batch_size=4`"),
        (20, 8, "--set sft.resources.gradient_checkpointing=true --set sft.resources.micro_batch_size=2"),
        (14, 8, "--set sft.resources.gpus=2 --set sft.resources.strategy=zero3"),
        (14, 1, "--set sft.resources.strategy=zero3 --set sft.resources.offload=all"),
        (2, 1, "no change of resources fits with 10% to spare: use larger GPUs"),
    ],
)
def test_the_cheapest_change_that_fits_is_named(room: int, gpus: int, advice: str, models: dict[str, Architecture]) -> None:
    training = job(models["Qwen2.5-7B"], 2048, resources={"micro_batch_size": 8})
    hint = fits.remedy(training, room * GIB, gpus, "sft")
    assert advice in hint


def test_adapters_on_fewer_layers_are_advised_where_memory_is_short(models: dict[str, Architecture]) -> None:
    fewer = "--set sft.lora.target_modules=[q_proj,v_proj]`, about 23.7 GiB"
    long = job(models["Qwen2.5-7B"], 16384, lora={"r": 64})
    found = [fits.remedy(long, room * GIB, 1, "sft") for room in (26, 24, 20)]
    assert [fewer in hint for hint in found] == [True, True, False]
    assert (
        "`--set sft.resources.gradient_checkpointing=true --set sft.resources.strategy=zero2 --set sft.resources.offload=optimizer`"
        in found[0]
    )
    whole = job(models["Qwen2.5-0.5B"], 16384, method="full")
    assert "q_proj" not in fits.remedy(whole, 9 * GIB, 1, "sft")


def test_advice_that_the_file_would_not_take_is_not_given(models: dict[str, Architecture]) -> None:
    """A global batch of 3 cannot be split over 2 processes unless they share each row; with one device there are no 2 GPUs."""
    of_three: dict[str, Any] = {"global_batch_size": 3, "resources": {"micro_batch_size": 3}}
    assert "sequence_parallel_size=2" in fits.remedy(job(models["Qwen2.5-7B"], **of_three), 14 * GIB, 8, "sft")
    for fields in (of_three | {"packing": True}, {"resources": {"devices": [0]}}):
        assert "gpus" not in fits.remedy(job(models["Qwen2.5-7B"], **fields), 14 * GIB, 8, "sft")
    assert "gpus=2" in fits.remedy(job(models["Qwen2.5-7B"]), 14 * GIB, 8, "sft")


def test_long_sequences_are_shared_where_nothing_cheaper_fits(models: dict[str, Architecture]) -> None:
    """Sharding weights does not reduce the activations of 131,072 tokens."""
    long = job(models["Qwen2.5-7B"], 1 << 17, resources={"gpus": 4})
    assert "--set sft.resources.sequence_parallel_size=2`, about 41.9 GiB" in fits.remedy(long, 60 * GIB, 8, "sft")
    assert "--set sft.resources.sequence_parallel_size=4" in fits.remedy(long, 30 * GIB, 8, "sft")
    wide = job(models["Qwen2.5-7B"], 1 << 17, resources={"gpus": 8})  # its 28 heads cannot be shared by 8 processes
    assert "--set sft.resources.sequence_parallel_size=4" in fits.remedy(wide, 24 * GIB, 8, "sft")
    shared = job(models["Qwen2.5-7B"], 1 << 17, resources={"gpus": 4, "sequence_parallel_size": 4, "micro_batch_size": 1})
    alone = job(models["Qwen2.5-7B"], 1 << 17, resources={"gpus": 4, "micro_batch_size": 1})
    assert shared.memory().activations == pytest.approx(alone.memory().activations / 4, rel=0.02)
    mistral = job(models["Mistral-7B-v0.1"], 1 << 17, resources={"gpus": 4})  # sliding-window attention
    assert "sequence_parallel_size" not in fits.remedy(mistral, 60 * GIB, 8, "sft")


def test_a_change_is_taken_into_the_stage(models: dict[str, Architecture]) -> None:
    training = job(models["Qwen2.5-7B"])
    changed = fits.applied(training, {"resources.micro_batch_size": 2, "method": "qlora"})
    assert (changed.method, changed.stage.resources.micro_batch_size, changed.stage.resources.gpus) == ("qlora", 2, 1)
    assert isinstance(changed.stage, SftStage)


def warnings_of(folder: Path, *sets: str) -> list[str]:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo", sets))
    return [str(warning) for warning in fits.warnings(workspace, "demo", plan(workspace, "demo"))]


def test_a_plan_warns_of_a_pool_that_is_too_small_with_place_and_remedy(folder: Path) -> None:
    (warning,) = warnings_of(folder)
    assert warning.startswith("".join([str(folder / "pipelines.yaml"), ":9:15: demo.sft: about "]))
    assert (
        "of GPU memory are needed, the pool `gpu` has 24.0 GiB for it\n\nhint: the cheapest change that fits: `--set sft.resources."
        in warning
    )


def test_a_need_just_above_what_is_there_reads_as_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo"))
    memory = estimates(workspace, "demo", plan(workspace, "demo"))["sft"].memory
    assert memory is not None
    needed = memory.total
    monkeypatch.setattr(fits, "room_for", lambda stage, memory: needed - (1 << 20))
    (warning,) = warnings_of(folder)
    assert warning.partition(": demo.sft: ")[2].startswith(f"about {needed / GIB:.3f} GiB of GPU memory are needed, the pool `gpu` has ")
    assert f" has {needed / GIB - 1 / 1024:.3f} GiB for it" in warning


def test_a_plan_warns_of_what_is_tight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(load(folder / "pipelines.yaml", "demo"))
    memory = estimates(workspace, "demo", plan(workspace, "demo"))["sft"].memory
    assert memory is not None
    for share, tight in ((1.0, True), (0.95, True), (0.89, False)):
        monkeypatch.setattr(fits, "room_for", lambda stage, _, share=share: round(memory.total / share))
        warnings = warnings_of(folder)
        assert len(warnings) == tight
        assert all(", which is tight: estimates are off by 10% or more\n\nhint: the cheapest change that" in text for text in warnings)
        assert all("--set sft.resources.micro_batch_size=4`" in text for text in warnings)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({}, math.inf),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        # Llama 3.1, Phi 3 and Qwen2.5 with YaRN as its README has it.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            },
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
    ],
)
def test_how_far_positions_reach(fields: dict[str, Any], positions: float) -> None:
    assert reach(fields) == positions


def test_a_plan_warns_of_rows_beyond_the_models_positions(folder: Path) -> None:
    def warned(positions: int | None, *sets: str) -> list[str]:
        (folder / "base" / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-7B"] | {"max_position_embeddings": positions}))
        read.cache_clear()
        return warnings_of(folder, "sft.resources.gpus=0", *sets)

    (warning,) = warned(1024)
    assert (
        ":9:67: demo.sft.max_length: sequences may have 2048 tokens, more than the model's positions, 1024\n\nhint: lower it, set `max_length` in `data`"
        in warning
    )
    assert warned(2048) == warned(None) == warned(1024, "data.max_length=1024") == []
    assert len(warned(1024, "sft.packing=true", "data.max_length=null")) == 1
    assert warned(1024, "sft.packing=true", "data.max_length=512") == []  # each row of a packed sequence counts from 0

    text = PIPELINE.replace(
        "kind: sft, model: base, dataset: data, max_length: 4096", "kind: grpo, model: base, dataset: data, rewards: [{type: exact_match}]"
    )
    (folder / "pipelines.yaml").write_text(text)
    (warning,) = warned(2200)
    assert "demo.sft.max_completion_length: sequences may have 2304 tokens, more than the model's positions, 2200" in warning
    assert warned(2304) == warned(2200, "data.max_length=null") == []  # the length of prompts is unknown


def test_a_plan_warns_of_heads_that_cannot_be_shared(folder: Path) -> None:
    (warning,) = warnings_of(folder, "sft.resources.gpus=0", "sft.resources.processes=8", "sft.resources.sequence_parallel_size=8")
    assert (
        "demo.sft.resources.sequence_parallel_size: found 8, expected 1, 2, 4, 28 for the model's 28 attention heads and 4 key-value heads"
        in warning
    )


def test_the_memory_of_the_cpu_is_told_where_weights_wait_there(models: dict[str, Architecture]) -> None:
    hint = fits.remedy(job(models["Qwen2.5-7B"], 2048, resources={"micro_batch_size": 8}), 14 * GIB, 1, "sft")
    assert "offload=all" in hint
    assert "GiB of CPU memory per process" in hint


@pytest.mark.parametrize(
    "sets", [["sft.pool=unsaid"], ["sft.resources.gpus=0"], ["sft.pool=large", "sft.resources.micro_batch_size=1"], ["sft.max_length=64"]]
)  # fmt: skip
def test_a_plan_does_not_warn_without_need(sets: list[str], folder: Path) -> None:
    assert warnings_of(folder, *sets) == []


def test_states_take_what_the_optimizer_keeps(models: dict[str, Architecture]) -> None:
    """Of all weights trained; paged ones are in CPU memory when the GPU's is short."""
    architecture = models["Llama-3-8B"]

    def states(optim: str) -> tuple[int, int]:
        memory = job(architecture, method="full", optim=optim).memory()
        return memory.optimizer, memory.offloaded

    adamw, _ = states("adamw")
    assert adamw == 8 * architecture.parameters
    assert states("adamw_8bit")[0] == pytest.approx(adamw / 4, rel=0.02)
    assert states("lion")[0] == adamw / 2
    assert states("adafactor")[0] < adamw / 100
    assert adamw / 2 < states("muon")[0] < 0.6 * adamw  # a bit more for the embeddings and the head
    assert states("paged_adamw_32bit") == (0, adamw)


def test_smoothed_labels_need_all_logits(models: dict[str, Architecture]) -> None:
    smooth, plain = (job(models["Qwen2.5-0.5B"], label_smoothing=share).memory().activations for share in (0.1, 0.0))
    assert smooth - plain > 4 * 1024 * 151936
