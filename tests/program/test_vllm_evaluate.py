"""evaluate with vLLM: figures, prompts and answers are those of transformers, and the same faults are found.

The stages borrow one server for most of them: a start takes half a minute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_table import save
from evaluate_tools import CHATS, chat, fails, own_benchmarks, request_for, samples, save_adapter
from peft import LoraConfig, get_peft_model
from pico import tokenizer
from program_tools import run_program
from safetensors.torch import load_file, save_file
from template_tools import OPENS
from transformers import AutoModelForCausalLM
from vllm_tools import ROOM, borrowed_from

from tasks.data.masks import prompt_ids
from tasks.data.rows import Row
from tasks.engine.client import Engine, Sampling
from tasks.evaluation import harness_vllm
from tasks.models.loading import template_hash
from tuneline.workspace.protocol import Input, Request

PLAIN = [Row(source="s", prompt=f"{i} and {i} are", completion=f" {2 * i}, naïvely", id=f"plain{i}") for i in range(3)]
TEXTS = [Row(source="s", text="One text, é and all. " * (i + 1), id=f"text{i}") for i in range(3)]
LIKELY = ("even", "rolled")  # benchmarks whose answers are log-probabilities
Started = tuple[Any, ...]
"""What an Engine was asked for."""
Found = tuple[dict[str, float], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def base(taught: Input) -> Input:
    return taught


@pytest.fixture(scope="module")
def adapter(base: Input, tmp_path_factory: pytest.TempPathFactory) -> Input:
    """With it the model says all kinds of things."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def borrowed(server: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """Stages get this server in place of one of their own; what they would have started is in the list."""
    asked: list[Started] = []
    monkeypatch.setattr(harness_vllm, "Engine", borrowed_from(server, lambda *arguments: asked.append(arguments)))
    return asked


def with_vllm(request: Request, python: Path = Path("python")) -> Request:
    return request.model_copy(update={"engine": python})


def both(folder: Path, model: Input, *datasets: list[Row], python: Path = Path("python"), **fields: Any) -> list[Found]:
    """Metrics and samples by transformers, and by vLLM."""
    found = []
    for backend in ("transformers", "vllm"):
        request = with_vllm(request_for(folder / backend, model, *datasets, backend=backend, **fields), python)
        result, _ = run_program(request)
        found.append((result.metrics, samples(request)))
    return found


def agree(found: list[Found], *, abs: float = 1e-3) -> None:
    (expected, expected_samples), (given, given_samples) = found
    assert given == pytest.approx(expected, abs=abs)
    said = [
        [(sample["of"], sample["id"], sample["prompt"], sample["answer"]) for sample in each] for each in (expected_samples, given_samples)
    ]
    likely = [i for i, sample in enumerate(expected_samples) if sample["of"] in LIKELY]
    for i in range(len(said[0])):
        assert said[0][i][:3] == said[1][i][:3]
        assert i in likely or said[0][i][3] == said[1][i][3]


def benchmarks(folder: Path) -> dict[str, list[Path]]:
    """Those of the other tests, and two more: answers cut at a text after two examples, and the likelihood of a text."""
    files = own_benchmarks(folder)
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\ntest_split: test\n"
    (folder / "cut.yaml").write_text(
        f"task: cut\n{common}fewshot_split: test\nnum_fewshot: 2\noutput_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {until: ['e', 'a'], max_gen_toks: 16, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    (folder / "rolled.yaml").write_text(
        f"task: rolled\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        encoding="utf-8",
    )
    return files


@pytest.mark.slow
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_figures_are_those_of_transformers(tmp_path: Path, base: Input, adapter: Input, borrowed: list[Started], what: str) -> None:
    files, model = benchmarks(tmp_path / "own"), {"base": base, "adapter": adapter}[what]
    asked = request_for(tmp_path / "asked", model, CHATS)
    run_program(asked)
    own = [sample["answer"] for sample in samples(asked)]
    rows = [chat(i, answer if i < 3 else f"no such words, {i}") for i, answer in enumerate(own)]  # three of seven are right
    fields: dict[str, Any] = {"files": files, "include_path": "own", "benchmarks": ["even", "said", "cut", "rolled"]}
    found = both(tmp_path, model, rows, PLAIN, TEXTS, **fields)
    agree(found)
    metrics = found[1][0]
    assert metrics["dataset0/exact_match"] == pytest.approx(3 / 7)
    assert {"dataset1/bits_per_byte", "dataset2/bits_per_byte", "even/acc", "cut/exact_match", "rolled/bits_per_byte"} <= metrics.keys()
    cut = [json.loads(sample["answer"])[0] for sample in found[1][1] if sample["of"] == "cut"]
    assert len(cut) == 8
    assert any(cut)
    assert not any("e" in text or "a" in text for text in cut)
    (started,) = borrowed
    longest, adapters = started[4:]
    assert (adapters.rank if adapters else None) == (None if what == "base" else 4)
    assert len(prompt_ids(rows[6], tokenizer())) + 12 <= longest < ROOM


@pytest.mark.full
def test_stop_texts_cut_equally_and_never_within_thoughts(tmp_path: Path, base: Input, borrowed: list[Started]) -> None:
    """Also where the generation prompt opens a thought that the model does not close: vLLM would stop within it."""
    asked = request_for(tmp_path / "asked", base, CHATS)
    run_program(asked)
    stop = sorted({sample["answer"][3:5] for sample in samples(asked)})
    found = both(tmp_path / "plain", base, CHATS, stop=stop)
    agree(found)
    assert found[1][0]["dataset0/stopped"] == 1.0
    folder = Path(shutil.copytree(base.path, tmp_path / "thinking"))
    (folder / "chat_template.jinja").write_text(OPENS)
    words = tokenizer()
    words.chat_template = OPENS
    agree(found := both(tmp_path / "opened", base.model_copy(update={"path": folder, "template": template_hash(words)}), CHATS, stop=stop))
    assert found[1][0]["dataset0/stopped"] < 1.0


@pytest.mark.slow
def test_answers_end_with_the_text_that_they_are_cut_at(server: Engine, adapter: Input) -> None:
    read = tokenizer()
    server.load("talkative", adapter.path)
    prompts = [read(f"What is {i}?")["input_ids"] for i in range(8)]
    for completion in server.generate(prompts, Sampling(max_tokens=64, temperature=0.0, stop=["e", "a"]), model="talkative"):
        assert len(completion.ids) == len(completion.logprobs) < 64
        assert any(end in read.decode(completion.ids) for end in "ea")
        assert not any(end in read.decode(completion.ids[:-1]) for end in "ea")
    server.unload("talkative")


@pytest.mark.slow
def test_sampled_answers_are_the_seeds(tmp_path: Path, adapter: Input, borrowed: list[Started]) -> None:
    files = benchmarks(tmp_path / "own")
    task = tmp_path / "own" / "said.yaml"
    greedy = task.read_text()
    answers = {}
    for name, seed, sampling in (("a", 1, ""), ("b", 1, ""), ("c", 2, ""), ("d", 1, ", top_k: 3")):
        task.write_text(greedy.replace("do_sample: false", f"do_sample: true, temperature: 1.0{sampling}"))
        request = with_vllm(
            request_for(tmp_path / name, adapter, files=files, include_path="own", benchmarks=["said"], backend="vllm", seed=seed)
        )
        if sampling:
            fails(request, "config", "a benchmark generates with top_k, which tuneline does not pass to vLLM")
        else:
            run_program(request)
            answers[name] = [sample["answer"] for sample in samples(request)]
    assert answers["a"] == answers["b"] != answers["c"]
    assert len(set(answers["a"])) == 8


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_found_out(tmp_path: Path, base: Input, borrowed: list[Started]) -> None:
    nothing = save_adapter(base, tmp_path / "adapter", trained=False).model_copy(update={"digest": "0" * 64})
    failure = fails(with_vllm(request_for(tmp_path / "run", nothing, CHATS, backend="vllm")), "bug", "the adapter changes nothing")
    assert failure.hint == "it was not trained, or was not loaded: check the loss of its training"


@pytest.mark.slow
def test_an_adapter_that_diverged_is_found_out(tmp_path: Path, adapter: Input, borrowed: list[Started]) -> None:
    broken = adapter.model_copy(update={"path": tmp_path / "adapter", "digest": "1" * 64})
    shutil.copytree(adapter.path, broken.path)
    weights = load_file(broken.path / "adapter_model.safetensors")
    # Only after the last attention: vLLM's cache of keys and values would keep what is not finite, for other tests of this server.
    last = max(name for name in weights if "down_proj.lora_B" in name)
    weights[last] *= torch.nan
    save_file(weights, broken.path / "adapter_model.safetensors")
    fails(with_vllm(request_for(tmp_path / "run", broken, CHATS, backend="vllm")), "bug", "log-probabilities are not finite")


@pytest.mark.slow
def test_the_engine_has_all_of_the_stages_gpus(
    tmp_path: Path, base: Input, borrowed: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("tasks.evaluation.evaluate.check_device", lambda stage: None)  # it finds out that there are none
    run_program(with_vllm(request_for(tmp_path, base, CHATS, backend="vllm", resources={"gpus": 2})))
    assert borrowed[0][0].gpus == ["4", "6"]


@pytest.mark.slow
def test_a_server_of_its_own_with_texts_over_the_models_length(tmp_path: Path, base: Input, vllm_python: Path) -> None:
    """Windows are two tokens shorter than those of transformers, so that the figures differ a little."""
    long = [Row(source="s", text="Many words, of one text. " * 400, id="long")]
    fields = {"benchmarks": ["human_eval"], "limit": 1, "allow_code_execution": True}
    resources = {"engine": {"enforce_eager": True, "cpu_memory": 0.25}}
    agree(both(tmp_path, base, long, python=vllm_python, resources=resources, **fields), abs=0.02)
    log = (tmp_path / "vllm" / "out" / "meta" / "engine.log").read_text()
    assert "'max_model_len': 2048" in log


# --- without a server -------------------------------------------------------------------------------------------------


def test_what_vllm_cannot_do_is_refused_before_it_is_started(tmp_path: Path, base: Input) -> None:
    short = {"engine": {"max_model_len": 32}}
    request = request_for(tmp_path / "short", base, CHATS, backend="vllm", resources=short)
    fails(with_vllm(request), "config", r"resources.engine.max_model_len: found 32, expected \d+, as in the longest request")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    model.save_pretrained(tmp_path / "output", save_embedding_layers=False)
    tokenizer().save_pretrained(tmp_path / "output")
    output = Input(path=tmp_path / "output", digest="c" * 64, type="Adapter", template=base.template, base=base)
    fails(with_vllm(request_for(tmp_path / "head", output, CHATS, backend="vllm")), "config", "the adapter changes lm_head")
    mixture = save(tmp_path / "mixture", "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(mixture.path)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])).save_pretrained(
        tmp_path / "experts"
    )
    tokenizer().save_pretrained(tmp_path / "experts")
    experts = Input(path=tmp_path / "experts", digest="c" * 64, type="Adapter", template=mixture.template, base=mixture)
    request = with_vllm(request_for(tmp_path / "of-experts", experts, CHATS, backend="vllm"))
    assert (
        "merge it and evaluate the model"
        in fails(request, "config", "the adapter changes experts, which vLLM reads under other names").hint
    )
    own = tmp_path / "own-code"
    shutil.copytree(base.path, own)
    (own / "modeling_own.py").touch()
    with_code = base.model_copy(update={"path": own})
    fails(with_vllm(request_for(tmp_path / "code", with_code, CHATS, backend="vllm")), "config", "models with their own code in vLLM")
