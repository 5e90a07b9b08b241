"""Optimizers, schedules, noise, label smoothing and attention: each takes effect as configured, and resumes bit for bit."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from process_tools import losses
from program_tools import payload_digest, run_program, run_until
from safetensors.torch import load_file
from sft_tools import OTHERS, ROWS, TURNING, furthest, request_for
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.optimization import get_scheduler

from tasks.data.masks import sequences
from tasks.data.rows import Row
from tasks.models.attention import set_attention
from tasks.models.loading import check_device, load_model, load_tokenizer
from tasks.training import sft
from tasks.training.noise import add_noise, lengths
from tasks.training.optimizers import MuonWithAdamW, muon, schedule
from tuneline.errors import StageFailed
from tuneline.kinds.optimization import Optimizer
from tuneline.kinds.sft import SftStage
from tuneline.workspace.protocol import Input, Request

STAGE: dict[str, Any] = {"kind": "sft", "model": "base", "dataset": "data"}
OTHER: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"adam_beta1": 0.8},
    "adafactor": {},
    "lion": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "muon": {"lora": {"r": 4, "use_dora": True}},
}


def whole_and_killed(folder: Path, base: Input, **fields: Any) -> tuple[Request, Request]:
    whole, killed = (request_for(folder / name, base, **fields, resources={"checkpoint_steps": 2}) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    run_until(killed, 4)
    assert run_program(killed)[0].metrics == expected.metrics
    assert payload_digest(killed) == payload_digest(whole)
    assert losses(killed) == losses(whole)
    return whole, killed


@pytest.mark.parametrize("optim", [pytest.param(name, marks=[] if name == "muon" else pytest.mark.full) for name in OTHER])
def test_each_optimizer_learns_and_resumes_bit_for_bit(tmp_path: Path, base: Input, optim: str) -> None:
    whole, _ = whole_and_killed(tmp_path, base, optim=optim, **OTHER[optim])
    found = losses(whole)
    assert found[6] < found[1]


@pytest.mark.full
@pytest.mark.parametrize("optim", OTHER)
def test_each_optimizer_trains_every_weight_and_resumes_bit_for_bit(tmp_path: Path, base: Input, optim: str) -> None:
    """With weights that are large enough for states in 8 bits, vectors and embeddings."""
    fields = {"method": "full", "learning_rate": 1e-3 if optim != "lion" else 1e-4, "optim": optim}
    whole, killed = (request_for(tmp_path / name, base, **fields, resources={"checkpoint_steps": 2}) for name in ("whole", "killed"))
    expected, _ = run_program(whole)
    run_until(killed, 4)
    assert run_program(killed)[0].metrics == expected.metrics
    assert payload_digest(killed) == payload_digest(whole)
    assert losses(whole)[6] < losses(whole)[1]
    states = torch.load(whole.work / "checkpoints" / "checkpoint-6" / "optimizer.pt")["state"].values()
    bits = [tensor.dtype for state in states for tensor in state.get("__bnb_optimizer_quant_state__", {}).values()]
    assert (torch.uint8 in bits) == (optim == "adamw_8bit")


def test_8_bit_states_are_used_and_train_nearly_as_32_bits() -> None:
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    for overrides in ("pid2config", "index2config"):  # those of embeddings in earlier tests, by ids and positions
        getattr(GlobalOptimManager.get_instance(), overrides).clear()
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 128), [torch.randn(64, 128) for _ in range(5)]
    found = {}
    for name, make in {"torch": torch.optim.AdamW, "bits": lambda p, lr: AdamW(p, lr=lr, optim_bits=8)}.items():
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=1e-2)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found[name] = weight.detach() - start
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert (found["bits"] - found["torch"]).norm() < 0.1 * found["torch"].norm()


# --- muon -------------------------------------------------------------------------------------------------------------


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(config)


def test_muon_trains_the_hidden_matrices_alone_and_adamw_the_rest() -> None:
    stage = SftStage.model_validate(STAGE | {"optim": "muon", "method": "full", "learning_rate": 1e-2, "weight_decay": 0.1})
    model = small()
    optimizer = muon(model, {name for name, _ in model.named_parameters() if "norm" not in name}, stage)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    matrices = {"q", "k", "v", "o", "gate", "up", "down"}
    for name, parameter in model.named_parameters():
        alone = torch.nn.Parameter(before[name].clone())
        alone.grad = gradients[name]
        decay = 0.0 if "norm" in name else 0.1
        hidden = name.split(".")[-2].removesuffix("_proj") in matrices
        other = torch.optim.Muon if hidden else torch.optim.AdamW
        options = {"adjust_lr_fn": "match_rms_adamw"} if hidden else {}
        other([alone], lr=1e-2, weight_decay=decay, **options).step()
        torch.testing.assert_close(parameter, alone)


def test_muon_is_one_optimizer_for_schedules_and_checkpoints() -> None:
    stage = SftStage.model_validate(STAGE | {"optim": "muon", "method": "full", "learning_rate": 1e-2})

    def train(model: LlamaForCausalLM, optimizer: MuonWithAdamW, steps: range) -> None:
        for i in steps:
            model(input_ids=torch.arange(i, i + 8)[None], labels=torch.arange(8)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = small()
    optimizer = muon(model, set(), stage)
    train(model, optimizer, range(3))
    state = deepcopy(optimizer.state_dict())
    assert len(state["state"]) == len(list(model.parameters()))
    resumed = small()
    resumed.load_state_dict(model.state_dict())
    other = muon(resumed, set(), stage)
    other.load_state_dict(deepcopy(state))
    for each in (optimizer, other):
        for group in each.param_groups:
            group["lr"] = 1e-3  # as a schedule sets it
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert all(one.equal(two) for one, two in zip(model.parameters(), resumed.parameters(), strict=True))
    constant = small()
    constant.load_state_dict(model.state_dict())
    unscheduled = muon(constant, set(), stage)
    unscheduled.load_state_dict(state)
    for each in unscheduled.param_groups:
        each["lr"] = 0.0
    train(constant, unscheduled, range(3, 6))
    assert all(one.equal(two) for one, two in zip(model.parameters(), constant.parameters(), strict=True))


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(fields: dict[str, Any], steps: int = 10) -> list[float]:
    """The learning rates of a training, as shares of the peak."""
    stage = SftStage.model_validate(STAGE | {"learning_rate": 0.5} | fields)
    assert not list(stage.problems())
    arguments = TrainingArguments(warmup_steps=stage.warmup_steps, report_to="none", use_cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=stage.learning_rate)
    name, settings = stage.lr_scheduler_type, schedule(stage, steps, arguments)
    scheduler = get_scheduler(name, optimizer, arguments.get_warmup_steps(steps), steps, settings)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"] / stage.learning_rate)
        optimizer.step()
        scheduler.step()
    return found


SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "cosine": ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 0.2}, [0.2 + 0.4 * (1 + math.cos(math.pi * i / 10)) for i in range(11)]),
    "a share": ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.2, "lr_decay_steps": 0.2, "min_lr_ratio": 0.5}, [0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5]),
    "steps": ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 2}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
    "polynomial": ({"lr_scheduler_type": "polynomial", "lr_power": 2, "min_lr_ratio": 0.1}, [0.1 + 0.9 * (1 - i / 10) ** 2 for i in range(11)]),
    "root": ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4}, [0, 0.25, 0.5, 0.75, *(math.sqrt(4 / i) for i in range(4, 11))]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_follows_the_schedule(name: str) -> None:
    fields, expected = SCHEDULES[name]
    assert rates(fields) == pytest.approx(expected, abs=1e-6)


def test_a_training_too_short_for_its_schedule_ends_before_the_first_step(tmp_path: Path, base: Input) -> None:
    request = request_for(tmp_path, base, lr_scheduler_type="warmup_stable_decay", warmup_steps=4, lr_decay_steps=4)
    with pytest.raises(StageFailed, match="found 4 steps after 4 of warm-up, but the training has only 6"):
        run_program(request)


# --- noise, labels, the best ------------------------------------------------------------------------------------------


def test_the_noise_of_a_row_depends_on_its_own_length_alone() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert lengths({"attention_mask": mask}).tolist() == [[4], [1]]
    assert lengths({"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}).tolist() == [[3, 3, 3, 1, 2, 2]]
    model = small()
    plain = model.get_input_embeddings().weight
    add_noise(model, 8.0)
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.detach()))
    ids = torch.zeros(2, 4, dtype=torch.long)
    model.train()(input_ids=ids, attention_mask=mask)
    model.eval()(input_ids=ids, attention_mask=mask)
    noise = (seen[0] - plain[0]).abs()
    assert 0.8 < noise[0].max() / (8 / math.sqrt(4 * 16)) <= 1
    assert 0.8 < noise[1].max() / (8 / math.sqrt(1 * 16)) <= 1
    assert seen[1].equal(plain[0].expand(2, 4, -1))


@pytest.mark.full
def test_noise_changes_the_training_and_resumes_bit_for_bit(tmp_path: Path, base: Input) -> None:
    noisy, _ = whole_and_killed(tmp_path, base, neftune_noise_alpha=10.0)
    whole_and_killed(tmp_path / "packed", base, neftune_noise_alpha=10.0, packing=True, max_length=128)
    plain = request_for(tmp_path / "plain", base)
    run_program(plain)
    assert furthest(noisy, plain) > 1e-3


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor:FutureWarning")
def test_smoothed_labels_are_trained_and_the_validation_loss_is_not_smoothed(tmp_path: Path, base: Input) -> None:
    """Compared with the formula (arXiv:1512.00567, section 7) on the base's logits."""
    rows, others = ROWS[:4], OTHERS[:3]
    fields = {"validation": others, "eval_steps": 1, "max_steps": 1, "learning_rate": 1e-9, "resources": {"micro_batch_size": 2}}
    request = request_for(tmp_path, base, rows, label_smoothing=0.4, **fields)
    run_program(request)
    model, words = load_model(base, torch.float32).requires_grad_(False), load_tokenizer(base)

    def expected(rows: list[Row], share: float) -> float:
        """The mean over all trained tokens."""
        found = []
        for tokens in (tokens for row in rows for tokens in sequences(row, words, "assistant")):
            ids, labels = torch.tensor(tokens.input_ids), torch.tensor(tokens.labels)[1:]
            losses = -model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[labels != -100]
            found.append((1 - share) * losses.gather(-1, labels[labels != -100, None])[:, 0] + share * losses.mean(-1))
        return float(torch.cat(found).mean())

    assert losses(request)[1] == pytest.approx(expected(rows, 0.4), rel=3e-5)
    assert losses(request, "eval_loss")[1] == pytest.approx(expected(others, 0.0), rel=3e-5)
    assert expected(rows, 0.4) != pytest.approx(expected(rows, 0.0), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor:FutureWarning")
@pytest.mark.full
def test_smoothed_labels_do_not_depend_on_the_micro_batch_and_resume(tmp_path: Path, base: Input) -> None:
    whole, _ = whole_and_killed(tmp_path, base, label_smoothing=0.1)
    small_batches = request_for(tmp_path / "small", base, label_smoothing=0.1, resources={"micro_batch_size": 1})
    run_program(small_batches)
    assert losses(small_batches) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.full
def test_the_best_is_kept_without_stopping(tmp_path: Path, base: Input) -> None:
    fields = {**TURNING, "early_stopping": None, "save_best": True, "max_steps": 20}
    whole, killed = (request_for(tmp_path / name, base, **fields) for name in ("whole", "killed"))
    result, events = run_program(whole)
    evaluated = {e["step"]: e["value"] for e in events if e.get("name") == "eval_loss"}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert (result.metrics["steps"], result.metrics["best_step"], result.metrics["eval_loss"]) == (20, best, evaluated[best])
    assert best < 20
    kept = load_file(whole.work / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(tensor.equal(kept[name]) for name, tensor in load_file(whole.payload / "adapter_model.safetensors").items())
    run_until(killed, best + 3)
    assert run_program(killed)[0].metrics == result.metrics
    assert payload_digest(killed) == payload_digest(whole)


# --- attention, compile -----------------------------------------------------------------------------------------------


def test_eager_attention_trains_as_sdpa_and_the_manifest_names_it(tmp_path: Path, base: Input) -> None:
    auto, eager = (
        request_for(tmp_path / name, base, max_steps=3, resources={"attn_implementation": name} if name == "eager" else {})
        for name in ("auto", "eager")
    )
    assert run_program(auto)[0].info["attention"] == "sdpa"
    assert run_program(eager)[0].info["attention"] == "eager"
    assert losses(eager) == pytest.approx(losses(auto), rel=1e-4)


def test_flash_attention_is_chosen_where_it_is_and_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, only the answers are stood in for; the choice is real."""
    gpu = SftStage.model_validate(STAGE | {"resources": {"gpus": 1}, "dtype": "bfloat16"})
    named = SftStage.model_validate(STAGE | {"resources": {"gpus": 1, "attn_implementation": "flash_attention_2"}, "dtype": "bfloat16"})
    model = small()
    set_attention(model, gpu)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(StageFailed, match="found flash_attention_2, which this runtime or GPU lacks"):
        set_attention(model, named)

    chosen: list[str] = []
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: True)
    monkeypatch.setattr(model, "set_attn_implementation", chosen.append)
    for capability, expected in (((9, 0), "flash_attention_3"), ((8, 0), "flash_attention_2"), ((10, 0), "flash_attention_2")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        set_attention(model, gpu)
        assert chosen.pop() == expected
    for changed in ({"dtype": "float32"}, {"resources": {}}):
        set_attention(model, SftStage.model_validate(gpu.model_dump() | {"dtype": "float32"} | changed))
    model.config.head_dim = 512
    set_attention(model, gpu)
    assert not chosen


def test_what_changes_only_speed_reaches_the_trainer(tmp_path: Path, base: Input) -> None:
    fast = {"gpus": 1, "kernels": "liger", "compile": True, "activation_offloading": True}
    request = request_for(tmp_path, base, dtype="float32", resources=fast)
    arguments = sft.trainer_arguments(request, request.stage())
    assert (arguments.use_liger_kernel, arguments.torch_compile, arguments.activation_offloading) == (True, True, True)


def test_kernels_that_the_runtime_lacks_are_named(tmp_path: Path, base: Input, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    request = request_for(tmp_path, base, dtype="float32", resources={"gpus": 1, "kernels": "liger"})
    with pytest.raises(StageFailed, match="found liger, which this runtime lacks"):
        check_device(request.stage())


@pytest.mark.full
def test_a_compiled_model_trains_the_same(tmp_path: Path, base: Input) -> None:
    plain, compiled = (request_for(tmp_path / str(on), base, max_steps=3, resources={"compile": on}) for on in (False, True))
    run_program(plain)
    run_program(compiled)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


def test_every_optimizer_is_one_that_transformers_or_this_project_makes() -> None:
    from typing import get_args

    from transformers.training_args import OptimizerNames

    from tasks.training.optimizers import NAMES

    assert set(get_args(Optimizer)) == {*NAMES, "adamw", "muon"}
    assert set(NAMES.values()) <= {each.value for each in OptimizerNames}
