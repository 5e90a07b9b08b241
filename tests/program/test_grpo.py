"""The grpo program on pico models: what it learns, what it hands over, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from architecture_table import save
from elsewhere import Elsewhere
from grpo_tools import ROWS, question, request_for, undecided
from process_tools import finish
from program_tools import payload_digest, run_program, run_until
from safetensors.torch import load_file

from tasks.training import grpo
from tuneline.errors import StageFailed
from tuneline.kinds.grpo import GrpoStage
from tuneline.workspace.protocol import Input


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return undecided(tmp_path_factory.mktemp("pico") / "model")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def values(events: list[dict[str, Any]], name: str) -> list[float]:
    return [event["value"] for event in events if event.get("name") == name]


def test_a_model_that_counts_padding_among_the_positions_is_refused(tmp_path: Path) -> None:
    """TRL gives no positions with the prompts that it pads; those of GPT-2 are absolute."""
    rows = [question(1), question(11111)]
    request = request_for(tmp_path / "run", save(tmp_path / "model", "gpt2"), rows=rows, max_steps=1)
    with pytest.raises(StageFailed, match="padding before a prompt changes this model's output") as refused:
        run_program(request)
    assert refused.value.failure_class == "config"


def test_it_learns_what_is_rewarded_and_tells_how(tmp_path: Path, base: Input) -> None:
    rewards = [{"type": "exact_match"}, {"type": "length", "full_up_to": 6, "zero_from": 8, "weight": 0.5}]
    request = request_for(tmp_path, base, max_steps=25, global_batch_size=16, num_generations=8, rewards=rewards)
    result, events = run_program(request)
    rewarded = values(events, "reward/exact_match")
    assert len(rewarded) == 25
    assert sum(rewarded[-5:]) / 5 > sum(rewarded[:5]) / 5 + 0.15
    metrics = result.metrics
    assert metrics["reward_gain"] == pytest.approx(metrics["reward"] - metrics["reward_first"])
    assert metrics["reward"] == pytest.approx(sum(values(events, "reward")[-10:]) / 10)
    assert metrics["reward"] == pytest.approx(metrics["reward/exact_match"] + 0.5 * metrics["reward/length"], abs=1e-6)
    short = grpo.figures(
        [
            {
                "step": i + 1,
                "reward": float(i),
                "loss": 0.0,
                **dict.fromkeys(
                    (
                        "completions/mean_length",
                        "completions/clipped_ratio",
                        "frac_reward_zero_std",
                        "entropy",
                        "rewards/exact_match/mean",
                        "rewards/length/mean",
                    ),
                    0.0,
                ),
            }
            for i in range(4)
        ],
        request.stage(),
    )  # type: ignore[arg-type]
    assert (short["reward_first"], short["reward"], short["reward_gain"]) == (0.5, 2.5, 2.0)
    assert {"reward_std/length", "completion_length", "truncated", "entropy", "groups_without_signal", "tokens_per_second"} <= {
        e.get("name") for e in events
    }
    assert "freshness_max_logprob_diff" not in metrics
    progress = [event for event in events if event["type"] == "progress"]
    assert (progress[-1]["step"], progress[-1]["total"]) == (25, 25)
    assert progress[-1]["message"].startswith("reward ")
    samples = [event["data"] for event in events if event["type"] == "sample"]
    assert {"exact_match", "length"} == set(samples[0]["rewards"])
    kept = lines(request.meta / "rollouts.jsonl")
    assert [line["step"] for line in kept] == [step for step in range(1, 26) for _ in range(16)]
    right = [line for line in kept if line["completion"].strip() == "It is 1."]
    assert right
    assert all(line["rewards"]["exact_match"] == 1.0 for line in right)
    assert sum(line["rewards"]["exact_match"] for line in kept) == len(right)
    config = json.loads((request.payload / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, f"tuneline:{base.digest}")
    assert (request.payload / "chat_template.jinja").exists()
    assert not list(request.payload.glob("*.md"))


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path, base: Input, elsewhere: Elsewhere) -> None:
    requests = [request_for(tmp_path / name, base) for name in ("a", "b é")]
    run_program(requests[0])
    elsewhere.run(requests[1])
    assert payload_digest(requests[0]) == payload_digest(requests[1])


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"num_iterations": 2, "beta": 0.1}], ids=["plain", "iterations and beta"])
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path: Path, base: Input, fields: dict[str, Any]) -> None:
    """Also where it goes on from an adapter, which beside a `beta` is there a second time, as what it is compared with."""
    before = request_for(tmp_path / "before", base, max_steps=2)
    adapter = Input(path=before.payload, digest="a" * 64, type="Adapter", template=run_program(before)[0].info["template"], base=base)
    fields = {"max_steps": 6, "resources": {"checkpoint_steps": 2}, **fields}
    whole, killed = (request_for(tmp_path / name, base, adapter, **fields) for name in ("whole", "killed"))
    run_program(whole)
    run_until(killed, 5)
    checkpoint = killed.work / "checkpoints" / "checkpoint-4"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    result, _events = run_program(killed)
    assert result.metrics["steps"] == 6
    assert payload_digest(killed) == payload_digest(whole)
    kept = lines(killed.meta / "rollouts.jsonl")
    assert kept == lines(whole.meta / "rollouts.jsonl")
    assert {name.split(".")[-2] for name in load_file(killed.payload / "adapter_model.safetensors")} == {"lora_A", "lora_B"}


def test_a_reference_is_the_adapter_it_began_with(tmp_path: Path, base: Input) -> None:
    """The divergence is from there: none at the first step, some later."""
    before = request_for(tmp_path / "before", base, max_steps=4)
    adapter = Input(path=before.payload, digest="a" * 64, type="Adapter", template=run_program(before)[0].info["template"], base=base)
    _, events = run_program(request_for(tmp_path / "after", base, adapter, beta=0.1))
    divergence = values(events, "kl")
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"scale_rewards": "batch", "epsilon_high": 0.28}, {"mask_truncated_completions": True, "top_p": 0.9, "top_k": 20, "temperature": 0.8},
    ],
)  # fmt: skip
def test_what_is_asked_for_reaches_the_trainer(tmp_path: Path, base: Input, fields: dict[str, Any]) -> None:
    request = request_for(tmp_path, base, max_steps=2, **fields)
    arguments = grpo.trainer_arguments(request, request.stage())  # type: ignore[arg-type]
    assert {name: getattr(arguments, name) for name in fields} == fields
    assert arguments.generation_batch_size == 8
    run_program(request)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", get_args(GrpoStage.model_fields["loss_type"].annotation))
def test_the_micro_batch_changes_nothing(tmp_path: Path, base: Input, loss_type: str) -> None:
    fields = {"max_steps": 2, "loss_type": loss_type}
    requests = [request_for(tmp_path / str(micro), base, **fields, resources={"micro_batch_size": micro}) for micro in (8, 2)]
    for request in requests:
        run_program(request)
    one, other = (load_file(request.payload / "adapter_model.safetensors") for request in requests)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-3
    completions = [[line["completion"] for line in lines(request.meta / "rollouts.jsonl")[:8]] for request in requests]
    assert completions[0] == completions[1]


def test_a_device_that_cannot_compute_in_its_type_is_refused(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(StageFailed, match="torch .* sees no GPU"):
        run_program(request_for(tmp_path, base, resources={"gpus": 1}))


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path: Path, base: Input) -> None:
    """Each samples its share, so the completions are others than one process's; a step has as many, and both end with one adapter."""
    request = request_for(tmp_path, base, max_steps=3, resources={"processes": 2, "micro_batch_size": 2})
    assert finish(request, 2)["steps"] == 3
    kept = lines(request.meta / "rollouts.jsonl")
    assert [line["step"] for line in kept] == [step for step in range(1, 4) for _ in range(8)]
    for step in range(1, 4):  # both processes' groups are whole
        prompts = [line["prompt"] for line in kept if line["step"] == step]
        assert {prompts.count(prompt) for prompt in prompts} == {4}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_rewards_that_are_all_the_same_teach_nothing(tmp_path: Path, base: Input) -> None:
    rows = [question(i, "Never.") for i in range(8)]
    with pytest.raises(
        StageFailed, match="in all 4 steps the completions of each group had the same reward \\(at first 0.000\\)"
    ) as caught:
        run_program(request_for(tmp_path, base, rows=rows))
    assert caught.value.failure_class == "data"


def test_a_prompt_that_is_there_twice_is_asked_once(tmp_path: Path, base: Input) -> None:
    rows = [*ROWS, replace(ROWS[0], id="again", answer="It is 2.")]
    _, events = run_program(request_for(tmp_path, base, rows=rows, max_steps=1))
    assert "1 of 9 train rows have the same prompt as another row, and are left out" in [event.get("message") for event in events]


def test_fewer_prompts_than_a_step_takes(tmp_path: Path, base: Input) -> None:
    with pytest.raises(StageFailed, match="found 1 prompts in the train split, expected at least 2, as many as in a step"):
        run_program(request_for(tmp_path, base, rows=ROWS[:1]))


def test_a_prompt_too_long_for_the_engine_or_the_model(tmp_path: Path, base: Input) -> None:
    engine = {"rollouts": {"engine": "vllm"}, "resources": {"engine": {"max_model_len": 16}}}
    with pytest.raises(StageFailed, match=r"the prompt of row row0 has \d+ tokens, .* is more than resources.engine.max_model_len, 16"):
        run_program(request_for(tmp_path / "engine", base, **engine))
    with pytest.raises(StageFailed, match=r"is more than the model's positions, 2048"):
        run_program(request_for(tmp_path / "model", base, max_completion_length=2040))


def test_a_reward_of_ones_own_that_breaks_shows_the_sample(tmp_path: Path, base: Input) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, completions, **columns):\n    return [1 / 0 for _ in completions]\n")
    rewards = [{"file": "mine.py", "function": "score"}]
    request = request_for(tmp_path / "stage", base, rewards=rewards)
    request = request.model_copy(update={"files": {"rewards.0.file": [file]}})
    with pytest.raises(StageFailed, match="ZeroDivisionError") as caught:
        run_program(request)
    assert caught.value.failure_class == "data"
    assert "mine.py:2" in str(caught.value) + caught.value.details
    assert "assistant" in str(caught.value) + caught.value.details


def test_throughput_after_a_resume_and_of_steps_that_sample_nothing(tmp_path: Path) -> None:
    """TRL counts tokens from the checkpoint's number on, and only in steps that sample (num_iterations above 1)."""
    from types import SimpleNamespace

    from tasks.training.shared import Report

    said: list[tuple[str, float]] = []
    events: Any = SimpleNamespace(metric=lambda name, value, step=None: said.append((name, value)), progress=lambda *_: None)
    report, arguments = Report(events, list), SimpleNamespace(learning_rate=1e-3, world_size=1)
    state: Any = SimpleNamespace(
        num_input_tokens_seen=1000, global_step=5, max_steps=9, is_world_process_zero=True, log_history=[{"loss": 1.0}]
    )
    report.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
    for logs in ({"loss": 1.0, "num_tokens": 1300.0}, {"loss": 1.0}, {"loss": 1.0, "num_tokens": 1500.0}):
        report.on_step_begin(arguments, state, None)  # type: ignore[arg-type]
        report.on_log(arguments, state, None, logs)  # type: ignore[arg-type]
    speeds = [value for name, value in said if name == "tokens_per_second"]
    assert report.tokens == 500
    assert len(speeds) == 2
    assert min(speeds) > 0
