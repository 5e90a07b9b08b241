"""Messages of `validate` about evaluations by vLLM, and their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.planning.keys import key_document

STAGE: dict[str, Any] = {"kind": "evaluate", "model": "base", "benchmarks": ["arc_easy"]}
FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base:  {{kind: model, path: model}}
      data:  {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      sft:   {{kind: sft, model: base, dataset: data, lora: {{{lora}}}}}
      small: {{kind: quantize, model: base, calibration: data{bits}}}
      eval:  {{kind: evaluate, datasets: [data], {rest}}}
"""
HINT = "\n\nhint: set `backend: transformers`"
HALF = "GPTQ and no GPU: vLLM computes GPTQ only in half precision, but evaluations on a CPU use float32"
REFUSED = {
    "unknown": ("model: base, backend: sglang", "demo.eval.backend: found 'sglang', expected transformers, vllm"),
    "quantized on a CPU": ("model: small, backend: vllm", f"demo.eval.model: found `small` with {HALF}{HINT}"),
    "quantized in float32": (
        "model: small, backend: vllm, resources: {gpus: 1}, dtype: float32",
        f"demo.eval.model: found `small` with GPTQ in float32: vLLM computes GPTQ only in half precision{HINT}",
    ),
    "bits": (
        "model: small, backend: vllm, resources: {gpus: 1}",
        f"demo.eval.model: found `small` with bits 2 and sym true, but vLLM supports only symmetric 4 or 8 bits{HINT}",
    ),
    "dora": ("model: sft, backend: vllm", f"demo.eval.model: found `sft` with DoRA, which vLLM does not serve{HINT}"),
    "rank": ("model: sft, backend: vllm", f"demo.eval.model: found `sft` with rank 600, but vLLM serves at most 512{HINT}"),
    "engine without use": (
        "model: base, resources: {engine: {max_num_seqs: 8}}",
        "demo.eval.resources.engine: found engine settings in a stage that does not use vLLM\n\nhint: remove them, or choose vLLM for the stage",
    ),
    "some of the GPUs": (
        "model: base, backend: vllm, resources: {gpus: 4, engine: {gpus: 2}}",
        "demo.eval.resources.engine.gpus: found 2, expected 4 (resources.gpus): vLLM uses all GPUs of an evaluation\n\nhint: remove it",
    ),
    "micro-batch": (
        "model: base, backend: vllm, resources: {micro_batch_size: 4}",
        "demo.eval.resources.micro_batch_size: found micro_batch_size with `backend: vllm`, which forms its own batches\n\nhint: "
        "remove it; `engine: {max_num_seqs: ...}` limits how many sequences vLLM processes at the same time",
    ),
    "few-shot without benchmarks": (
        "model: base, num_fewshot: 0",
        "demo.eval.num_fewshot: found num_fewshot without benchmarks: it has no effect\n\nhint: remove it",
    ),
    "tasks without benchmarks": (
        "model: base, include_path: mine",
        "demo.eval.include_path: found include_path without benchmarks: it has no effect\n\nhint: remove it",
    ),
    "template without benchmarks": (
        "model: base, apply_chat_template: false",
        "demo.eval.apply_chat_template: found apply_chat_template without benchmarks: it has no effect\n\nhint: remove it",
    ),
    "code that no benchmark runs": (
        "model: base, benchmarks: [arc_easy], allow_code_execution: true",
        "demo.eval.allow_code_execution: found allow_code_execution without human_eval, the only benchmark that runs code\n\nhint: remove it",
    ),
    "processes": (
        "model: base, backend: vllm, resources: {gpus: 2, processes: 2}",
        "demo.eval.resources.processes: found processes with `backend: vllm`, whose server has its own\n\nhint: remove it; `gpus` and "
        "`engine: {data_parallel: ...}` say how many GPUs compute at the same time",
    ),
    "processes that share a GPU": (
        "model: base, resources: {gpus: 2, processes: 4}",
        "demo.eval.resources.processes: found 4 with 2 GPUs for an evaluation, expected one process per GPU\n\nhint: remove it",
    ),
    "machines": (
        "model: base, resources: {nodes: 2}",
        "demo.eval.resources.nodes: found 2 for evaluate, expected 1\n\nhint: remove it: only trainings run on several machines",
    ),
    "nobody to wait for": (
        "model: base, resources: {collective_timeout: 60}",
        "demo.eval.resources.collective_timeout: found collective_timeout for evaluate, which is not a training\n\nhint: remove it",
    ),
    "copies on a CPU": (
        "model: base, backend: vllm, resources: {engine: {data_parallel: 2}}",
        "demo.eval.resources.engine.data_parallel: found 2 with 0 GPUs for vLLM, expected 1\n\nhint: each copy of the model gets the same "
        "number of GPUs",
    ),
    "copies of another size": (
        "model: base, backend: vllm, resources: {gpus: 4, engine: {data_parallel: 3}}",
        "demo.eval.resources.engine.data_parallel: found 3 with 4 GPUs for vLLM, expected 1, 2, 4\n\nhint: each copy of the model gets the "
        "same number of GPUs",
    ),
}


def written(folder: Path, rest: str, what: str = "") -> Path:
    lora = {"dora": "use_dora: true", "rank": "r: 600"}.get(what, "r: 8")
    file = folder / "p.yaml"
    file.write_text(FILE.format(rest=rest, lora=lora, bits=", bits: 2" if what == "bits" else ""))
    return file


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(tmp_path: Path, what: str) -> None:
    rest, message = REFUSED[what]
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, rest, what))
    assert str(caught.value).partition(": ")[2] == message


@pytest.mark.parametrize(
    "rest",
    [
        "model: small, backend: vllm, resources: {gpus: 1}",
        "model: sft, backend: vllm, resources: {gpus: 2, engine: {gpus: 2}}",
        "model: small",
        "model: base, num_fewshot: null, apply_chat_template: true",
        "model: base, benchmarks: [human_eval], allow_code_execution: true, num_fewshot: 0, include_path: mine",
        "model: base, resources: {micro_batch_size: 4}",
    ],
)
def test_what_can_work_is_not(tmp_path: Path, rest: str) -> None:
    load(written(tmp_path, rest))


def stage(**fields: Any) -> EvaluateStage:
    return EvaluateStage.model_validate({**STAGE, **fields})


def test_the_backend_is_in_the_key_and_how_it_runs_is_not() -> None:
    plain, vllm, moved = (
        key_document(given, 1, {})["config"]
        for given in (
            stage(),
            stage(backend="vllm", resources={"gpus": 1}),
            stage(backend="vllm", resources={"gpus": 2, "engine": {"max_num_seqs": 8}}),
        )
    )
    assert plain == {"benchmarks": ["arc_easy"], "dtype": "float32"}
    assert vllm == moved == {"benchmarks": ["arc_easy"], "backend": "vllm", "dtype": "bfloat16"}


def test_one_process_asks_vllm_whatever_its_gpus() -> None:
    given = stage(backend="vllm", resources={"gpus": 4})
    assert given.runtimes() == ["torch", "vllm"]
    assert given.world_size() == 1
    assert given.micro_batch_size() is None
    assert stage().runtimes() == ["torch"]
    assert stage(resources={"gpus": 2}).world_size() == 2


def test_vllm_on_two_machines_is_refused() -> None:
    """Its server runs on one; the other machine would join and idle."""
    problems = stage(backend="vllm", resources={"nodes": 2}).common_problems()
    assert [(problem.field, problem.message) for problem in problems] == [("resources.nodes", "found 2 for evaluate, expected 1")]
