"""Libraries that misbehave: what would be silently wrong must end the stage in which it happens with a message that names it.

Artifacts that were tampered with are in program/test_tampered.py. What is planted elsewhere already:

    loss is no number from the start    program/test_sft            test_a_loss_that_is_no_number_ends_the_training
    packed rows see one another         program/test_sft            test_packed_rows_do_not_see_one_another
    full precision, garbage weights     program/test_quantize       test_stops_full_precision, test_stops_wrong_weights, ...
    a data file edited once cached      core/test_plan, flow/test_run   test_an_edited_file_is_the_reason, test_a_file_that_changes_...
    a failure replayed from the cache   flow/test_run               test_a_failure_skips_what_needs_it_and_spares_the_rest
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program_tools import emulates_bfloat16
from safetensors.torch import load_file
from silent_tools import CONFIGS, World, edit_weights, refused
from trl import DPOTrainer, KTOTrainer

from tasks.convert import merge
from tasks.data import dataset
from tasks.data.rows import SPLITS, content_hash, read_rows
from tasks.evaluation import evaluate as evaluation
from tasks.evaluation.harness import LanguageModel
from tasks.evaluation.harness_vllm import EngineModel
from tasks.models import adapters, loading
from tasks.training import answers, sft
from tasks.training import shared as training
from tasks.training.dpo_trainer import PairTrainer
from tasks.training.grpo_trainer import AdapterTrainer, EpochSampler
from tasks.training.kto_trainer import LabelTrainer
from tasks.training.row_weighted import RowWeighted
from tasks.training.sft_trainer import TokenWeightedTrainer
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.workspace.protocol import Input, Result

Patch = pytest.MonkeyPatch


OWN = {  # of our subclasses of library classes: what is theirs alone, and replaces nothing
    AdapterTrainer: {"step_rows", "_keep"},
    EpochSampler: {"set_epoch"},
    TokenWeightedTrainer: {
        *("step_tokens", "step_rows", "flattened", "flat_collator", "flatten", "_collate_and_remember", "_without_repeats"),
    },
    RowWeighted: {
        "halves",
        "masks",
        "per_row",
        "step_rows",
        "counts",
        "over_processes",
        "loss_of_masked",
        "totals_of",
        "_without_repeats",
        "_prepare_dataset",
    },  # the last one replaces that of the trainers beside it
    PairTrainer: {"halves", "per_row", "counts", "loss_of_masked", "totals_of"},
    LabelTrainer: {"masks", "counts", "loss_of_masked", "totals_of", "_divergence"},
    LanguageModel: {
        *("write", "check_generation", "one_by_one", "_begin", "_advance", "_count_stopped", "_greedy", "_generate", "_cut", "_has_stop"),
        *("shares_beginnings", "_score", "_end"),
    },
    EngineModel: {"serve", "check", "_broken_off"},
}


@pytest.mark.parametrize("ours", OWN, ids=lambda ours: ours.__name__)
def test_overridden_methods_exist_upstream(ours: type) -> None:
    """A method that a new release has renamed would be overridden by one that nobody calls; one of our own must hide none of theirs."""
    theirs = {name for base in ours.__mro__ if not base.__module__.startswith("tasks.") for name in vars(base)}
    defined = {name for name in vars(ours) if not name.startswith("__")}
    assert defined - theirs == OWN[ours]
    assert ours is not RowWeighted or all(hasattr(trainer, "_prepare_dataset") for trainer in (DPOTrainer, KTOTrainer))


def test_nothing_planted_nothing_stopped(world: World, tmp_path: Path) -> None:
    for kind in CONFIGS.keys() - {"quantize"}:
        assert isinstance(world.run(tmp_path / kind, kind), Result), kind


# --- devices that compute otherwise than the key says ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "evaluate"])
def test_a_stage_refuses_a_device_that_cannot_compute_in_its_type(world: World, tmp_path: Path, kind: str, monkeypatch: Patch) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f bf16x\n")
    monkeypatch.setattr(loading, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(world.run(tmp_path / "cpu", kind, dtype="bfloat16"), "config: dtype is bfloat16, which this CPU only emulates")
    refused(world.run(tmp_path / "gpu", kind, resources={"gpus": 1}), "config: resources.gpus is 1, but torch .* sees no GPU")


def test_bfloat16_is_for_gpus_and_cpus_that_have_it(tmp_path: Path, monkeypatch: Patch) -> None:
    def stage(**fields: Any) -> EvaluateStage:
        stage = EvaluateStage.model_validate({"kind": "evaluate", "model": "m", **fields})
        return stage.model_copy(update=stage.decided())

    monkeypatch.setattr(loading, "CPU_INFO", tmp_path / "cpuinfo")
    for flags in ("flags\t: fpu avx512_bf16 amx_tile", "flags\t: amx_bf16", "Features\t: fp asimd bf16"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
        loading.check_device(stage(dtype="bfloat16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: ("A100", "T4")[number])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: ((8, 0), (7, 5))[number])
    with pytest.raises(StageFailed, match=r"T4 \(compute capability 7.5\) has no bfloat16") as error:
        loading.check_device(stage(resources={"gpus": 2}))
    assert (error.value.failure_class, "set `dtype: float32`" in error.value.hint) == ("config", True)
    loading.check_device(stage(resources={"gpus": 2}, dtype="float32"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    loading.check_device(stage(resources={"gpus": 1}))


@pytest.mark.skipif(emulates_bfloat16(), reason="this CPU only emulates bfloat16")
def test_what_is_asked_for_in_bfloat16_is_computed_in_it(world: World, tmp_path: Path) -> None:
    scored = {dtype: world.run(tmp_path / dtype, "evaluate", dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert [result.info["dtype"] for result in scored.values() if isinstance(result, Result)] == ["float32", "bfloat16"]
    one, other = (result.metrics["dataset0/bits_per_byte"] for result in scored.values() if isinstance(result, Result))
    assert one != other == pytest.approx(one, rel=0.05)


# --- libraries that misbehave -----------------------------------------------------------------------------------------


def collator(patch: Patch, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Changes the rows of every batch before TRL makes it."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    real = DataCollatorForLanguageModeling.torch_call
    patch.setattr(DataCollatorForLanguageModeling, "torch_call", lambda self, rows: real(self, change(rows)))


def masks_all(patch: Patch) -> None:
    collator(patch, lambda rows: [{**row, "labels": [-100] * len(row["labels"])} for row in rows])


def masks_later(patch: Patch) -> None:
    calls: list[int] = []

    def change(rows: list[dict[str, Any]]) -> Any:
        calls.append(1)
        return rows if len(calls) <= 8 else [{**row, "labels": [-100] * len(row["labels"])} for row in rows]

    collator(patch, change)


def cuts_batches(patch: Patch) -> None:
    collator(patch, lambda rows: [{name: row[name][:12] for name in ("input_ids", "labels")} for row in rows])


def prepares(patch: Patch, change: Callable[[Any, str], Any]) -> None:
    """Changes a split while TRL takes it in."""
    from transformers import Trainer

    real = Trainer.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        splits = {name: options[name] for name in ("train_dataset", "eval_dataset") if options.get(name) is not None}
        real(self, *arguments, **options | {name: change(split, name) for name, split in splits.items()})

    patch.setattr(Trainer, "__init__", init)


def drops_a_row(patch: Patch) -> None:
    prepares(patch, lambda split, name: split.select(range(len(split) - 1)))


def drops_a_validation_row(patch: Patch) -> None:
    prepares(patch, lambda split, name: split if name == "train_dataset" else split.select(range(len(split) - 1)))


def truncates(patch: Patch) -> None:
    prepares(patch, lambda split, name: split.map(lambda row: {key: value[:20] for key, value in row.items()}))


def drops_the_last_batch(patch: Patch) -> None:
    real = sft.trainer_arguments

    def arguments(*given: Any) -> Any:
        found = real(*given)
        found.dataloader_drop_last = True
        return found

    patch.setattr(sft, "trainer_arguments", arguments)


def loss_of_nan(patch: Patch) -> None:
    from tasks.training.sft_trainer import TokenWeightedTrainer

    real = TokenWeightedTrainer.compute_loss
    patch.setattr(
        TokenWeightedTrainer,
        "compute_loss",
        lambda self, *args, **kw: real(self, *args, **kw) * (float("nan") if self.state.global_step == 2 else 1),
    )


def optimizer_does_nothing(patch: Patch) -> None:
    patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def lora(patch: Patch, **changes: Any) -> None:
    real = adapters.configuration

    def config(*given: Any) -> Any:
        found = real(*given)
        for name, value in changes.items():
            setattr(found, name, value)
        return found

    patch.setattr(adapters, "configuration", config)


def saves_half_the_rank(patch: Patch) -> None:
    real = training.adapter_tensors
    patch.setattr(
        training,
        "adapter_tensors",
        lambda model: {name: (t[:2] if "lora_A" in name else t[:, :2]).contiguous() for name, t in real(model).items()},
    )


def saves_another_vocabulary(patch: Patch) -> None:
    def save(tokenizer: Any, payload: Path) -> None:
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["<other>"])
        other.save_pretrained(payload)

    patch.setattr(answers, "save_tokenizer", save)


def saves_another_template(patch: Patch) -> None:
    def save(tokenizer: Any, payload: Path) -> None:
        tokenizer.save_pretrained(payload)
        (payload / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")

    patch.setattr(answers, "save_tokenizer", save)


def merges(patch: Patch, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the weights once they are merged."""
    real = merge.merge_streamed

    def merged(config: Any, parts: Any, weights: Any, payload: Path, *rest: Any) -> None:
        real(config, parts, weights, payload, *rest)
        edit_weights(payload / "model.safetensors", edit)

    patch.setattr(merge, "merge_streamed", merged)


def with_another_alpha(patch: Patch) -> None:
    real = merge.merge_streamed

    def merged(config: Any, *rest: Any) -> None:
        config.lora_alpha *= 1.5
        real(config, *rest)

    patch.setattr(merge, "merge_streamed", merged)


def merged_how_often(patch: Patch, times: int, world: World) -> None:
    base, once = (load_file(world.artifacts[kind].payload / "model.safetensors") for kind in ("model", "merge"))
    merges(patch, lambda tensors: tensors.update({name: base[name] + times * (once[name] - base[name]) for name in tensors}))


def swaps_layers(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def copies(patch: Patch, instead: Callable[[Path], None]) -> None:
    """Tampers with what merge has copied of the trained tokenizer."""
    real = merge.saved_tokenizer

    def saved(tokenizer: Any, model: Input) -> Any:
        instead(model.path)
        return real(tokenizer, model)

    patch.setattr(merge, "saved_tokenizer", saved)


def no_tokenizer(payload: Path) -> None:
    for file in payload.glob("tokenizer*"):
        file.unlink()


def other_template(payload: Path) -> None:
    (payload / "chat_template.jinja").write_text("{{ messages[0].content }}")


def ignores_adapter(patch: Patch) -> None:
    real = loading.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        model.base_model.disable_adapter_layers()
        return model

    patch.setattr(evaluation, "load_model", load)


def scores_the_base(patch: Patch) -> None:
    """lm-eval holds the model under the adapter."""
    from lm_eval.models.huggingface import HFLM

    real = HFLM.__init__

    def init(self: Any, pretrained: Any, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        real(self, pretrained=AutoModelForCausalLM.from_pretrained(pretrained.get_base_model().name_or_path), **options)

    patch.setattr(HFLM, "__init__", init)


def reads_half_the_adapter(patch: Patch) -> None:
    import peft.peft_model

    real = peft.peft_model.load_peft_weights
    renamed = lambda name: name.replace(".layers.1.", ".blocks.1.")  # noqa: E731
    patch.setattr(peft.peft_model, "load_peft_weights", lambda *a, **kw: {renamed(name): t for name, t in real(*a, **kw).items()})


def encodes_otherwise(patch: Patch) -> None:
    from tasks.evaluation.harness import LanguageModel

    real = LanguageModel.tok_batch_encode
    patch.setattr(LanguageModel, "tok_batch_encode", lambda self, texts, **kw: real(self, [" " + text for text in texts], **kw))


def renders_otherwise(patch: Patch) -> None:
    from lm_eval.models.huggingface import HFLM

    patch.setattr(HFLM, "apply_chat_template", lambda self, history, *rest, **kw: history[0]["content"])


def splits_by_row(patch: Patch) -> None:
    places = random.Random(0)
    patch.setattr(dataset, "bucket", lambda *_: places.random())


def loses(patch: Patch, name: str) -> None:
    """A step of the dataset program that loses the last row."""
    real = getattr(dataset, name)
    patch.setattr(dataset, name, lambda items, *rest: real(list(items)[:-1], *rest))


# Conversations of one and of two turns that begin alike.
TWICE = {"sources": [{"type": "files", "path": "data.jsonl"}, {"type": "files", "path": "longer.jsonl"}]}
MISBEHAVING: list[tuple[str, str, Callable[[Patch], Any], dict[str, Any], str]] = [
    ("every label masked", "sft", masks_all, {}, r"bug: tokens and trained tokens: found \(\d+, 0\) in the first batch, expected \(\d+, \d+\)"),
    ("every label of a later step masked", "sft", masks_later, {}, r"bug: every label is masked in the batch of step [2-9]\b"),
    ("rows cut in batches", "sft", cuts_batches, {}, r"bug: tokens and trained tokens: found \(48, \d+\) in the first batch, expected \(\d+, \d+\)"),
    ("a row dropped", "sft", drops_a_row, {}, r"bug: rows, tokens and trained tokens: found \(\d+, \d+, \d+\) in the trainer, expected"),
    ("a validation row dropped", "sft", drops_a_validation_row, {"eval_steps": 3}, "bug: rows, tokens and trained tokens: found"),
    ("rows truncated", "sft", truncates, {}, "bug: rows, tokens and trained tokens: found"),
    ("the last batch dropped", "sft", drops_the_last_batch, {"max_steps": None, "global_batch_size": 8}, r"bug: 1\.00 epochs: found \d+ trained tokens, expected \d+ or more"),
    ("a loss of NaN", "sft", loss_of_nan, {}, "data: loss is nan at step 3 of 30"),
    ("an adapter that was not trained", "sft", optimizer_does_nothing, {}, "data: the training changed nothing: every lora_B of the adapter has its initial value"),
    ("another r", "sft", lambda p: lora(p, r=8), {}, "bug: the adapter has r 8, expected 4"),
    ("another alpha", "sft", lambda p: lora(p, lora_alpha=16), {}, "bug: the adapter has lora_alpha 16, expected 8"),
    ("another alpha for one layer", "sft", lambda p: lora(p, alpha_pattern={"q_proj": 64}), {}, "bug: the adapter has alpha_pattern {'q_proj': 64}, expected {}"),
    ("tensors of another rank", "sft", saves_half_the_rank, {}, "bug: .*lora_A.weight of the adapter has rank 2, expected 4"),
    ("an adapter without its tokenizer", "sft", lambda p: p.setattr(answers, "save_tokenizer", lambda *a: None), {}, "bug: the adapter was saved without its tokenizer"),
    ("an adapter with another tokenizer", "sft", saves_another_vocabulary, {}, "bug: the adapter was saved with another tokenizer than it was trained with"),
    ("an adapter with another template", "sft", saves_another_template, {}, "data: the chat template beside the adapter is not the one recorded when it was made"),
    ("train and test overlapping", "dataset", splits_by_row, TWICE, r"bug: group \w+ is in \w+ and in \w+"),
    ("a row lost on the way", "dataset", lambda p: loses(p, "deduplicated"), {}, "bug: rows were lost: 59 are left of"),
    ("a row lost in writing", "dataset", lambda p: loses(p, "write_rows"), {}, r"bug: train\.parquet: found \d+ rows, expected \d+"),
    ("a merged model with another alpha", "merge", with_another_alpha, {}, "bug: logits of the merged model differ from base . adapter by up to"),
    ("layers swapped", "merge", lambda p: merges(p, swaps_layers), {}, "bug: logits of the merged model differ"),
    ("untied weights", "merge", lambda p: merges(p, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})), {}, r"bug: the merged model: found [\d,]+ parameters, expected at most the base's [\d,]+: lm_head.weight was added"),
    ("a merged model without its tokenizer", "merge", lambda p: copies(p, no_tokenizer), {}, "bug: the model was saved without its tokenizer"),
    ("a merged model with another template", "merge", lambda p: copies(p, other_template), {}, "data: the chat template beside the model is not the one recorded"),
    ("an adapter disabled", "evaluate", ignores_adapter, {}, "bug: the adapter changes nothing: logits with and without it are the same"),
    ("an adapter that lm-eval does not hold", "evaluate", scores_the_base, {}, "bug: the adapter changes nothing"),
    ("an adapter read in part", "evaluate", reads_half_the_adapter, {}, r"bug: \d+ tensors of the adapter were not read into the model, first base_model\."),
    ("prompts encoded otherwise", "evaluate", encodes_otherwise, {}, r"bug: the prompt of row \w+ is not tokenized as in training"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "plant", "fields", "message"), [row[1:] for row in MISBEHAVING], ids=[row[0] for row in MISBEHAVING])
def test_a_library_that_misbehaves_is_noticed(
    world: World, tmp_path: Path, monkeypatch: Patch, kind: str, plant: Callable[[Patch], Any], fields: dict[str, Any], message: str
) -> None:
    plant(monkeypatch)
    refused(world.run(tmp_path / "run", kind, **fields), message)


@pytest.mark.parametrize("times", [0, 2])
def test_a_model_merged_twice_or_not_at_all_is_noticed(world: World, tmp_path: Path, monkeypatch: Patch, times: int) -> None:
    merged_how_often(monkeypatch, times, world)
    refused(world.run(tmp_path, "merge"), "bug: logits of the merged model differ from base . adapter by up to")


def test_lm_eval_rendering_through_another_template_is_noticed(world: World, tmp_path: Path, monkeypatch: Patch) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "one.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": 0}))
    (folder / "one.yaml").write_text(
        "task: one\ndataset_path: json\ndataset_kwargs: {data_files: {test: one.jsonl}}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: ['2', '3']\ndoc_to_target: answer\n"
    )
    renders_otherwise(monkeypatch)
    fields = {"benchmarks": ["one"], "datasets": [], "include_path": "own", "files": {"include_path": [folder]}}
    refused(world.run(tmp_path / "run", "evaluate", **fields), "bug: lm-eval renders questions through another chat template")


# --- conversations that begin alike -----------------------------------------------------------------------------------


def test_a_conversation_and_one_that_goes_on_from_it_are_never_on_two_sides(world: World, tmp_path: Path) -> None:
    found = world.run(tmp_path, "dataset", **TWICE)
    assert isinstance(found, Result)
    homes: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in read_rows(tmp_path / "out" / "payload" / f"{split}.parquet"):
            assert row.messages
            homes.setdefault(row.messages[0]["content"], set()).add(split)
    assert len(homes) == 60
    assert {len(splits) for splits in homes.values()} == {1}
    assert set.union(*homes.values()) == set(SPLITS)


def test_what_a_conversation_begins_with_is_its_group() -> None:
    system, greeting, user, answer = ({"role": role, "content": role} for role in ("system", "assistant", "user", "assistant"))
    for before in ([], [greeting]):
        group = content_hash([*before, user])
        for after in ([], [answer], [answer, user, answer]):
            row = dataset.identified(dataset.Row("s", messages=(system, *before, user, *after)))
            assert row.group == group
