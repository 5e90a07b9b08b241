"""The quantize program on a pico model that has learnt a little: what calibrates it, what it hands over, and what stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from older import Older, agree
from pico import save_pico, tokenizer
from program_tools import emulates_bfloat16, make_request, payload_digest, run_program
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.convert import quantize, quantizer
from tasks.data.masks import tokenize
from tasks.data.rows import SPLITS, Row, write_rows
from tasks.models import gptq, loading
from tasks.models.loading import load_model
from tasks.models.weights import read_weights
from tuneline.errors import StageFailed
from tuneline.kinds.quantize import QuantizeStage
from tuneline.workspace.protocol import Events, Input, Request, Result

pytestmark = [pytest.mark.usefixtures("gptqmodel_place"), pytest.mark.slow]
SMALL: dict[str, Any] = {"kind": "quantize", "model": "base", "calibration": "data", "samples": 8, "group_size": 32}
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}"
LAYERS = 2 * 7


def chat(i: int) -> Row:
    messages = ({"role": "user", "content": f"{i} + {i % 7}?"}, {"role": "assistant", "content": f"It is {i + i % 7}, of course."})
    return Row(source="s", messages=messages, id=f"row{i}", group=str(i))


TRAIN, TEST = [chat(i) for i in range(40)], [chat(i) for i in range(40, 50)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has learnt TRAIN, so that broken weights show in its perplexity, under a template of its own."""
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=3e4))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = words().pad({"input_ids": [ids(row) for row in TRAIN]}, return_tensors="pt")
    for _ in range(40):
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@cache
def words() -> Any:
    """The base's tokenizer."""
    found = tokenizer()
    found.chat_template = TEMPLATE
    return found


def ids(row: Row) -> list[int]:
    return tokenize(row, words(), "all").input_ids


def request_for(
    folder: Path, base: Path, train: list[Row] = TRAIN, validation: list[Row] | None = None, test: list[Row] = TEST, **fields: Any
) -> Request:
    data = folder / "data"
    data.mkdir(parents=True)
    for split, rows in zip(SPLITS, (train, validation or [], test), strict=True):
        write_rows(rows, data / f"{split}.parquet")
    inputs = {"model": Input(path=base, digest="b" * 64, type="Model"), "calibration": Input(path=data, digest="d" * 64, type="Dataset")}
    return make_request(folder, {**SMALL, **fields}, inputs)


@dataclass
class Done:
    request: Request
    result: Result
    events: list[dict[str, Any]]
    calibration: list[list[int]]
    """What reached gptqmodel."""


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    request, seen = request_for(tmp_path_factory.mktemp("done"), base), []
    with pytest.MonkeyPatch.context() as patch:
        real = quantizer.quantize
        patch.setattr(quantizer, "quantize", lambda source, rows, *rest: (seen.extend(rows), real(source, rows, *rest))[1])
        result, events = run_program(request)
    return Done(request, result, events, seen)


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what it hands over -----------------------------------------------------------------------------------------------


def test_quantizes(base: Path, done: Done) -> None:
    payload, metrics = done.request.payload, done.result.metrics
    assert metrics["quantized_layers"] == LAYERS
    assert metrics["perplexity_before"] < 20  # learnt: 9700 before
    assert 0.8 < metrics["perplexity_ratio"] < 1.5
    assert metrics["perplexity_ratio"] == pytest.approx(metrics["perplexity"] / metrics["perplexity_before"])
    assert metrics["bytes"] == (payload / "model.safetensors").stat().st_size
    assert metrics["size_ratio"] == metrics["bytes"] / (base / "model.safetensors").stat().st_size < 0.5
    tensors = load_file(payload / "model.safetensors")
    assert sum(name.endswith(".qweight") for name in tensors) == LAYERS
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int32}
    assert "lm_head.weight" not in tensors  # tied
    assert [event["step"] for event in done.events if event["type"] == "progress"] == [1, 2, 3, 4]
    assert {event.get("total") for event in done.events} == {4}
    assert "# GPTQ, 4 bits, group size 32" in (done.request.meta / "report.md").read_text()
    assert (done.request.meta / "quant_log.csv").exists()


def test_payload_is_of_no_host_and_keeps_the_tokenizer(base: Path, done: Done) -> None:
    payload = done.request.payload
    kept = {"chat_template.jinja", "generation_config.json", "tokenizer.json"}
    written = {"config.json", "quantize_config.json", "model.safetensors", "tokenizer_config.json"}  # the last as others read it, too
    assert {file.name for file in payload.iterdir()} == kept | written
    for name in kept:
        assert (payload / name).read_bytes() == (base / name).read_bytes()
    text = (payload / "config.json").read_text() + (payload / "quantize_config.json").read_text()
    assert "/tmp" not in text
    assert "_path" not in text
    before, after = json.loads((base / "config.json").read_text()), json.loads((payload / "config.json").read_text())
    assert after.pop("quantization_config")["bits"] == 4
    assert after == {**before, "dtype": "float16"} | {name: after[name] for name in after.keys() - before.keys()}
    assert after["tie_word_embeddings"]


def test_others_read_it(older: Older, done: Done) -> None:
    agree(older, Input(path=done.request.payload, digest="a", type="Model"))


def test_calibrates_on_train_rows_alone(done: Done) -> None:
    train, test = [ids(row) for row in TRAIN], [ids(row) for row in TEST]
    assert len(done.calibration) == 8
    assert all(row in train and row not in test for row in done.calibration)
    assert done.calibration != train[:8]  # drawn
    assert words().decode(done.calibration[0]).startswith("<|im_start|>user: ")  # the model's own template
    assert done.result.info["calibration"] == {"split": "train", "rows": 8, "tokens": sum(map(len, done.calibration))}
    assert done.result.info["perplexity"]["split"] == "test"
    assert done.result.info["perplexity"]["tokens"] == sum(len(row) - 1 for row in test)


OPTIONS: list[dict[str, Any]] = [
    {"bits": 8, "group_size": 64},
    {"bits": 2, "desc_act": True, "sym": False},
    {"bits": 3, "group_size": -1, "sym": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["8bits", "2bits-desc_act-asym", "3bits-asym-columns"])
def test_settings_and_decoding(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Every layer is decoded to the very values that gptqmodel's own kernels compute with."""
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear

    request = request_for(tmp_path, base, max_perplexity_ratio=1e9, **options)
    result, _ = run_program(request)
    assert result.metrics["quantized_layers"] == LAYERS
    settings = json.loads((request.payload / "config.json").read_text())["quantization_config"]
    assert {name: settings[name] for name in options} == options
    dense: Any = gptq.load_dense(request.payload, torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(request.payload, dtype=torch.float16, device_map="cpu")
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackableQuantLinear)}
    assert len(layers) == LAYERS
    for name, module in layers.items():
        assert torch.equal(PackableQuantLinear.dequantize_weight(module).t().float(), dense.get_submodule(name).weight), name
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_loading_without_a_gpu_decodes(done: Done) -> None:
    model = load_model(Input(path=done.request.payload, digest="a", type="Model"), torch.float32)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_borrowed_zeros() -> None:
    """A zero of 0 is stored as -1, which borrows from its neighbour's bits."""
    zeros = torch.tensor([[0, 3, 0, 0, 1, 2, 3, 0, 1, 1, 0, 3, 2, 2, 0, 1]])
    word = sum(int(zero) << (2 * i) for i, zero in enumerate(zeros[0])) - 0x55555555
    word = (word + 2**31) % 2**32 - 2**31  # as int32
    packed, codes, groups = torch.tensor([[word]], dtype=torch.int32), torch.zeros(1, 16, dtype=torch.int32), torch.zeros(16)
    weight = gptq.decode(codes, packed, torch.ones(1, 16).half(), groups, bits=2, zeros_less_one=True)
    assert weight[:, 0].int().tolist() == [-zero for zero in zeros[0].tolist()]


def test_same_payload_again(base: Path, done: Done, tmp_path: Path, elsewhere: Elsewhere) -> None:
    again, process = request_for(tmp_path / "again", base), request_for(tmp_path / "process", base)
    run_program(again)
    assert payload_digest(again) == payload_digest(done.request)
    elsewhere.run(process)
    assert payload_digest(process) == payload_digest(done.request)
    assert Result.read(process.work / "result.json").metrics == done.result.metrics


def test_shards_are_narrowed_and_their_index_with_them(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(save_pico(tmp_path / "model", vocabulary=300))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    quantizer.make_canonical(tmp_path / "sharded")
    weights = read_weights(tmp_path / "sharded")  # index and files agree
    assert weights.files > 1
    assert weights.types.startswith("F16, ")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * weights.parameters
    model.model.norm.weight.data[0] = 1e5
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(StageFailed, match="model.norm.weight holds values beyond float16's largest"):
        quantizer.make_canonical(tmp_path / "large")


# --- what goes in -----------------------------------------------------------------------------------------------------


def stage_of(**fields: Any) -> QuantizeStage:
    return QuantizeStage.model_validate({**SMALL, **fields})


def test_rows_are_drawn_with_the_seed_and_cut(tmp_path: Path, base: Path) -> None:
    data, events = request_for(tmp_path, base).inputs["calibration"], Events(tmp_path / "events.jsonl")

    def drawn(**fields: Any) -> list[list[int]]:
        return quantize.calibration_rows(data, words(), stage_of(**fields), events)

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert {len(row) for row in drawn(max_length=9)} == {9}
    assert len(drawn(samples=100)) == len(TRAIN)
    (warning,) = (tmp_path / "events.jsonl").read_text().splitlines()  # none before
    assert json.loads(warning)["message"] == "data has only 40 rows for calibration, fewer than samples: 100"


def test_short_rows_calibrate_too(tmp_path: Path, base: Path) -> None:
    """gptqmodel itself leaves out rows of up to 10 tokens."""
    short = [Row(source="s", text=f"{i} plus {i}", id=f"short{i}", group=f"short{i}") for i in range(4)]
    assert all(len(ids(row)) <= 10 for row in short)
    result, _ = run_program(request_for(tmp_path, base, [*TRAIN[:4], *short]))
    assert result.info["calibration"] == {"split": "train", "rows": 8, "tokens": sum(len(ids(row)) for row in [*TRAIN[:4], *short])}


def test_measures_on_rows_held_out(tmp_path: Path, base: Path) -> None:
    held_out = request_for(tmp_path / "a", base, validation=TEST[:3], test=[]).inputs["calibration"]
    split, rows = quantize.measured_rows(held_out, words(), stage_of())
    assert (split, len(rows)) == ("validation", 3)
    with pytest.raises(StageFailed, match="data has neither test nor validation rows") as failure:
        run_program(request_for(tmp_path / "b", base, test=[]))
    assert failure.value.failure_class == "data"
    assert "split" in failure.value.hint
    with pytest.raises(StageFailed, match="the train split of data is empty"):
        run_program(request_for(tmp_path / "c", base, train=[]))


def test_refuses_a_group_size_that_does_not_divide(tmp_path: Path, base: Path) -> None:
    with pytest.raises(StageFailed, match=r"group_size: found 128, which does not divide 64, the width of model\.layers\.0\.") as failure:
        run_program(request_for(tmp_path, base, group_size=128))
    assert failure.value.failure_class == "config"
    assert failure.value.hint == "this model allows -1, 16, 32, 64"


def test_refuses_a_quantized_model(tmp_path: Path, done: Done) -> None:
    with pytest.raises(StageFailed, match="already quantized, by gptq") as failure:
        run_program(request_for(tmp_path, done.request.payload))
    assert failure.value.failure_class == "config"


# --- a quantizer that went wrong --------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, written: Path, edit: Callable[[Path], None] = lambda folder: None) -> None:
    """In the quantizer's place: copies `written`, then edits the copy."""

    def quantized(source: Path, rows: Any, stage: Any, payload: Path, *rest: Any) -> dict[str, str]:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(written / name, payload / name)
        edit(payload)
        return {}

    monkeypatch.setattr(quantizer, "quantize", quantized)


def test_named_templates_are_kept(tmp_path: Path, base: Path, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, done.request.payload)
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    request = request_for(tmp_path, model)
    run_program(request)
    assert (request.payload / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS"


def test_stops_full_precision(tmp_path: Path, base: Path, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, base)
    with pytest.raises(StageFailed, match=r"config.json of the quantized model: found \{'quant_method': None"):
        run_program(request_for(tmp_path / "a", base))
    plant(monkeypatch, base, lambda folder: shutil.copyfile(done.request.payload / "config.json", folder / "config.json") and None)
    with pytest.raises(StageFailed, match="14 of 14 layers are not quantized, the first model.layers.0.mlp.down_proj"):
        run_program(request_for(tmp_path / "b", base))


DOWN = "model.layers.1.mlp.down_proj"


def one_dense(tensors: dict[str, Any]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{DOWN}.{part}"]
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 128).half()


def scrambled(tensors: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name] = tensors[name].flatten()[torch.randperm(tensors[name].numel())].view_as(tensors[name]) * 4


def noise(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.v_proj.qweight"
    tensors[name] = torch.randint(-(2**31), 2**31 - 1, tensors[name].shape, generator=torch.Generator().manual_seed(0)).int()


NOT_WHAT_IT_WAS = "between quantized and original weights"
FAULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str, str]] = [
    ("one-dense", one_dense, "bug", f"1 of 14 layers are not quantized, the first {DOWN}"),
    ("untied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), "bug", "the quantized model: found"),
    (
        "8bits",
        lambda t: t.update({f"{DOWN}.qweight": torch.zeros(32, 64, dtype=torch.int32)}),
        "bug",
        f"{DOWN}: found 8192 bytes, expected 4096 in 4 bits",
    ),
    ("no-norm", lambda t: t.pop("model.norm.weight"), "data", "1 tensors, first model.norm.weight"),
    ("scrambled", scrambled, "data", "perplexity rose from"),
    ("noise", noise, "bug", rf"model\.layers\.1\.self_attn\.v_proj: found a cosine of \S+ {NOT_WHAT_IT_WAS}"),
    ("zero-scales", lambda t: t[f"{DOWN}.scales"].zero_(), "bug", rf"{DOWN}: found a cosine of \S+ {NOT_WHAT_IT_WAS}"),
    ("nan", lambda t: t[f"{DOWN}.scales"].fill_(torch.nan), "bug", "found a cosine of nan"),
]


@pytest.mark.parametrize(("edit", "failure_class", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_stops_wrong_weights(
    tmp_path: Path, base: Path, done: Done, monkeypatch: pytest.MonkeyPatch, edit: Any, failure_class: str, message: str
) -> None:
    plant(monkeypatch, done.request.payload, lambda folder: edit_weights(folder, edit))
    lenient = {"max_perplexity_ratio": 1e9} if NOT_WHAT_IT_WAS in message else {}
    with pytest.raises(StageFailed, match=message) as failure:
        run_program(request_for(tmp_path, base, **lenient))
    assert failure.value.failure_class == failure_class


def test_stops_calibration_on_less(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptqmodel.models.base import BaseQModel

    real = BaseQModel.quantize
    monkeypatch.setattr(BaseQModel, "quantize", lambda self, rows, **options: real(self, rows[:-1], **options))
    with pytest.raises(StageFailed, match=r"calibration: found \d+ tokens in gptqmodel's log, expected \d+"):
        run_program(request_for(tmp_path, base))


def test_a_device_that_cannot_compute_in_its_type_is_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f bf16x\n")
    monkeypatch.setattr(loading, "CPU_INFO", tmp_path / "cpuinfo")
    with pytest.raises(StageFailed, match="dtype is bfloat16, which this CPU only emulates"):
        loading.check_device(request_for(tmp_path / "a", base, dtype="bfloat16").stage())


@pytest.mark.skipif(emulates_bfloat16(), reason="this CPU only emulates bfloat16")
def test_what_is_asked_for_in_bfloat16_is_written_in_it(tmp_path: Path, base: Path) -> None:
    request = request_for(tmp_path, base, dtype="bfloat16")
    run_program(request)
    types = {tensor.dtype for tensor in load_file(request.payload / "model.safetensors").values()}
    assert types == {torch.bfloat16, torch.float16, torch.int32}  # scales are float16 to any kernel


def test_stops_what_transformers_reads_otherwise(tmp_path: Path, base: Path, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marked format that is not the written one: decoding follows the mark, gptqmodel's kernels theirs."""
    plant(monkeypatch, done.request.payload)
    real = gptq.decode
    monkeypatch.setattr(gptq, "decode", lambda *t, zeros_less_one, **packed: real(*t, zeros_less_one=not zeros_less_one, **packed))
    with pytest.raises(StageFailed, match="logits of the quantized model in transformers differ") as failure:
        run_program(request_for(tmp_path, base, max_perplexity_ratio=1e9))
    assert failure.value.failure_class == "bug"


def test_names_layers_rounded_to_nearest(tmp_path: Path, base: Path, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, done.request.payload)
    planted = quantizer.quantize
    losses = {"0.mlp.up_proj": "0.01", "0.mlp.down_proj": "fallback(rtn): 0.02", "1.mlp.up_proj": "nan"}
    monkeypatch.setattr(quantizer, "quantize", lambda *arguments: planted(*arguments) or losses)
    result, events = run_program(request_for(tmp_path, base))
    assert result.info["rounded_to_nearest"] == 2
    warnings = [event["message"] for event in events if event["type"] == "warning"]
    assert warnings == ["2 layers saw too few tokens and are rounded to nearest, the first 0.mlp.down_proj"]
