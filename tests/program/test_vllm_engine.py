"""vLLM as a program's engine: its figures are transformers', the adapter asked for is the one that answers, nothing outlives it.

That it dies at work is in program/test_vllm_rollouts.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_variants import VARIANTS
from peft import LoraConfig, PeftModel, get_peft_model
from program_tools import run_program
from sft_tools import request_for
from transformers import AutoModelForCausalLM
from vllm_tools import GREEDY, LAYERS, PROMPTS, ROOM, SAMPLED

from tasks.engine.client import BASE, Adapters, Engine, Sampling
from tasks.engine.server import Place
from tuneline.errors import StageFailed
from tuneline.kinds.engine import EngineSettings
from tuneline.workspace.protocol import Input

pytestmark = pytest.mark.slow
END = 2


@pytest.fixture(scope="module")
def model(taught: Input) -> Path:
    return taught.path


@pytest.fixture
def engine(server: Engine) -> Engine:
    return server


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[Path]:
    """Two that do something, and name their base as ours do."""
    folders = [tmp_path_factory.mktemp("adapter") for _ in range(2)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        peft.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": f"tuneline:{seed:064x}"}))
    return folders


def start(python: Path, model: Path, log: Path, adapters: Adapters | None = None) -> Engine:
    settings = EngineSettings(enforce_eager=True, cpu_memory=0.25, start_timeout=600)
    return Engine(Place(python, log), model, settings, "float32", 128, adapters)


@pytest.mark.parametrize(
    ("copies", "flags"), [(1, {"--tensor-parallel-size=4"}), (2, {"--tensor-parallel-size=2", "--data-parallel-size=2"})]
)
def test_gpus_are_divided_among_copies(tmp_path: Path, copies: int, flags: set[str]) -> None:
    engine = Engine(Place(tmp_path, tmp_path, range(4)), tmp_path, EngineSettings(data_parallel=copies), "bfloat16", ROOM)
    assert {flag for flag in engine._server.arguments if "parallel" in flag} == flags


def expected(model: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    """transformers' log-probabilities of what may follow each token, shape [tokens, words]."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.inference_mode():
        return loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)


def check_greedy(engine: Engine, name: str, model: Path, adapter: Path | None) -> list[list[int]]:
    completions = engine.generate(PROMPTS, GREEDY, model=name)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        likely = expected(model, adapter, prompt + completion.ids)[len(prompt) - 1 : -1]
        assert completion.ids == likely.argmax(-1).tolist()
        assert completion.logprobs == pytest.approx(likely.max(-1).values.tolist(), abs=1e-3)
        assert completion.model == name
    return [completion.ids for completion in completions]


@pytest.mark.full
@pytest.mark.parametrize("name", ["attention", "expression", "pissa", "olora", "eva"])
def test_variants_of_lora_are_served_as_peft_reads_them(name: str, engine: Engine, taught: Input, tmp_path: Path) -> None:
    """Ranks, alphas and scalings by layer; adapters of a changed base are saved for the untouched one."""
    fields = VARIANTS[name] | {"learning_rate": 2e-2}
    request = request_for(tmp_path, taught, **fields)
    run_program(request)
    engine.load(name, request.payload)
    served = check_greedy(engine, name, taught.path, request.payload)
    engine.unload(name)
    assert served != check_greedy(engine, BASE, taught.path, None)


def test_greedy_is_that_of_transformers(engine: Engine, model: Path) -> None:
    check_greedy(engine, BASE, model, None)


def test_the_adapter_that_is_asked_for_answers(engine: Engine, model: Path, adapters: list[Path]) -> None:
    engine.load("first", adapters[0])
    engine.load("second", adapters[1])
    answers = [check_greedy(engine, name, model, adapter) for name, adapter in zip(("first", "second"), adapters, strict=True)]
    assert answers[0] != answers[1] != check_greedy(engine, BASE, model, None) != answers[0]
    with pytest.raises(StageFailed, match=r"cannot load the adapter third beside \['first', 'second'\]"):
        engine.load("third", adapters[0])
    engine.unload("first")
    with pytest.raises(StageFailed, match="cannot load the adapter first"):
        engine.load("first", adapters[1])
    with pytest.raises(StageFailed, match="404: The model `first` does not exist"):
        engine.generate(PROMPTS, GREEDY, model="first")
    engine.load("fourth", adapters[0])
    assert check_greedy(engine, "fourth", model, adapters[0]) == answers[0]
    assert check_greedy(engine, "second", model, adapters[1]) == answers[1]
    engine.unload("second")
    engine.unload("fourth")


def test_more_prompts_than_fit_a_batch_with_a_seed_each(engine: Engine) -> None:
    prompts = [[3 + (i + k) % 100 for k in range(100)] for i in range(40)]  # 4,000 tokens, of which it computes 2,048 together
    completions = engine.generate(prompts, Sampling(max_tokens=4, temperature=1.0), model=BASE, seed=7)
    assert all(completion.ids for completion in completions)


def test_an_adapter_of_layers_that_it_was_not_told_of_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(StageFailed, match="the adapter output: found weights for lm_head, expected only"):
        engine.load("output", tmp_path)


def test_an_engine_of_adapters_for_the_output_layer_does_not_score(model: Path, tmp_path: Path) -> None:
    for layers in (None, [*LAYERS, "lm_head"]):
        with pytest.raises(StageFailed, match="whose adapters may change lm_head cannot score"):
            start(Path("python"), model, tmp_path / "engine.log", Adapters(4, layers)).score(PROMPTS, BASE)


def test_another_process_of_the_training_may_ask_it_too(engine: Engine, vllm_python: Path, model: Path, tmp_path: Path) -> None:
    other = start(vllm_python, model, tmp_path / "engine.log")
    other.join(engine.address)
    assert other.generate(PROMPTS, GREEDY, model=BASE) == engine.generate(PROMPTS, GREEDY, model=BASE)
    other.__exit__(None, None, None)
    engine.generate(PROMPTS, GREEDY, model=BASE)


def test_without_its_key_it_does_not_answer(engine: Engine, vllm_python: Path, model: Path, tmp_path: Path) -> None:
    other = start(vllm_python, model, tmp_path / "engine.log")
    other.join((engine.address[0], "guessed"))
    with pytest.raises(StageFailed, match="answers POST /v1/completions with 401"):
        other.generate(PROMPTS, GREEDY, model=BASE)


def test_what_vllm_does_not_take_is_refused_in_its_words(engine: Engine, adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 99, "lora_alpha": 1, "target_modules": ["q_proj"]}')
    shutil.copy(adapters[0] / "adapter_model.safetensors", tmp_path)
    with pytest.raises(
        StageFailed, match="answers POST /v1/load_lora_adapter with 500: .*LoRA rank 99 is greater than max_lora_rank 8"
    ) as failed:
        engine.load("broad", tmp_path)
    assert failed.value.failure_class == "bug"


def test_samples_differ_by_seed_and_end_with_the_end_token(engine: Engine, model: Path) -> None:
    heard: list[tuple[int, int]] = []
    completions = engine.generate([PROMPTS[0]] * 40, SAMPLED, model=BASE, seed=7, done=lambda *state: heard.append(state))
    assert len({tuple(completion.ids) for completion in completions}) == 40
    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    assert 0 < len(ended) < 40
    for completion in completions:
        assert (completion.ids[-1] == END) == (completion.finish_reason == "stop")
        assert END not in completion.ids[:-1]
        assert len(completion.ids) == 64 or completion.finish_reason == "stop"
        likely = expected(model, None, PROMPTS[0] + completion.ids)[len(PROMPTS[0]) - 1 : -1]
        given = likely.gather(-1, torch.tensor([completion.ids]).T)[:, 0]
        assert completion.logprobs == pytest.approx(given.tolist(), abs=1e-3)
    assert heard == sorted(heard)
    assert heard[-1] == (40, sum(len(completion.ids) for completion in completions))
    again = engine.generate([PROMPTS[0]] * 3, SAMPLED, model=BASE, seed=[9, 7, 46])
    assert [completion.ids for completion in again] == [completions[i].ids for i in (2, 0, 39)]


def test_log_probabilities_are_those_before_temperature(engine: Engine, model: Path) -> None:
    (completion,) = engine.generate(PROMPTS[:1], Sampling(max_tokens=12, temperature=0.5, top_p=0.9, top_k=5), model=BASE, seed=1)
    likely = expected(model, None, PROMPTS[0] + completion.ids)[len(PROMPTS[0]) - 1 : -1]
    assert completion.logprobs == pytest.approx(likely.gather(-1, torch.tensor([completion.ids]).T)[:, 0].tolist(), abs=1e-3)
    assert all(token in row.topk(5).indices for token, row in zip(completion.ids, likely, strict=True))


def test_a_token_of_the_caller_ends_it_too(engine: Engine) -> None:
    (whole,) = engine.generate(PROMPTS[:1], GREEDY, model=BASE)
    (cut,) = engine.generate(PROMPTS[:1], replace(GREEDY, stop_token_ids=[whole.ids[3]]), model=BASE)
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[3]) + 1]
    assert (cut.finish_reason, whole.finish_reason) == ("stop", "length")


def test_scores_are_those_of_transformers(engine: Engine, model: Path, adapters: list[Path]) -> None:
    greedy = engine.generate(PROMPTS, GREEDY, model=BASE)
    engine.load("scorer", adapters[0])
    likeliest: list[bool] = []
    for name, adapter in ((BASE, None), ("scorer", adapters[0])):
        sequences = [prompt + completion.ids for prompt, completion in zip(PROMPTS, greedy, strict=True)]
        for tokens, score in zip(sequences, engine.score(sequences, name), strict=True):
            likely = expected(model, adapter, tokens)[:-1]
            following = torch.tensor(tokens[1:])
            assert score.logprobs == pytest.approx(likely.gather(-1, following[:, None])[:, 0].tolist(), abs=1e-3)
            assert score.greedy == (likely.argmax(-1) == following).tolist()
            likeliest += score.greedy
    assert 0 < sum(likeliest) < len(likeliest)
    engine.unload("scorer")


def test_a_prompt_that_is_too_long_is_refused_not_cut(engine: Engine) -> None:
    with pytest.raises(StageFailed, match=f"found a prompt that takes {ROOM + 4} tokens with its 12 new ones, expected at most {ROOM}"):
        engine.generate([[5] * (ROOM - 8)], GREEDY, model=BASE)


@pytest.mark.parametrize(
    "real", [pytest.param(True, marks=pytest.mark.full, id="vLLM"), pytest.param(False, id="a script that says the same")]
)
def test_one_that_cannot_come_up_says_why(vllm_python: Path, tmp_path: Path, real: bool) -> None:
    """vLLM takes half a minute to find out."""
    python = vllm_python
    if not real:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\nseq 100\necho NobodysModel\nexit 1\n")
        python.chmod(0o755)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NobodysModel"]}')
    with pytest.raises(StageFailed, match=r"(?s)ended with status 1 before it was ready; the end of engine.log:\n.*NobodysModel") as failed:
        start(python, tmp_path, tmp_path / "engine.log").__enter__()
    assert failed.value.failure_class == "config"
    assert len(failed.value.message.splitlines()) <= 21
