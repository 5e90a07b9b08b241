"""The evaluate program on pico models: figures against direct computations, the checks against planted faults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from elsewhere import Elsewhere
from evaluate_tools import CHATS, chat, fails, own_benchmarks, request_for, samples, save_adapter
from pico import save_pico, tokenizer
from program_tools import payload_digest, run_program
from transformers import AutoModelForCausalLM

from tasks.data.masks import prompt_ids, tokenize
from tasks.data.rendering import ends
from tasks.data.rows import Row
from tasks.models.loading import template_hash
from tasks.scoring.scores import answer_recall, exact_match, mean, ratio
from tuneline.workspace.benchmarks import task_files
from tuneline.workspace.protocol import Input


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model")
    return Input(path=folder, digest="b" * 64, type="Model", template=template_hash(tokenizer()))


def greedy(model: Any, row: Row, max_new_tokens: int = 12) -> str:
    """The model's answer, one row at a time by transformers."""
    return str(tokenizer().decode(generated(model, row, max_new_tokens), skip_special_tokens=True))


@torch.no_grad()
def generated(model: Any, row: Row, max_new_tokens: int) -> Any:
    words = tokenizer()
    ids = torch.tensor([prompt_ids(row, words)])
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    return model.generate(ids, **options)[0, ids.shape[1] :]


@torch.no_grad()
def bits(model: Any, ids: list[int], start: int, end: int) -> float:
    """-log2 of the probability of ids[start:end] after ids[:start]."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(start, end)) / math.log(2)


def test_answers_are_the_models_own_and_scored_exactly(base: Input, tmp_path: Path) -> None:
    """References planted from transformers' greedy answers, row by row: right for three rows of seven, whatever the batch."""
    model = AutoModelForCausalLM.from_pretrained(base.path)
    own = [greedy(model, row) for row in CHATS]
    assert all(answer.strip() for answer in own)
    rows = [chat(i, answer if i < 3 else "no such words") for i, answer in enumerate(own)]
    request = request_for(tmp_path, base, rows, resources={"micro_batch_size": 3})
    result, events = run_program(request)

    assert result.metrics["dataset0/exact_match"] == pytest.approx(3 / 7)
    assert result.metrics["dataset0/answer_recall"] == pytest.approx(3 / 7)
    assert result.metrics["dataset0/exact_match_stderr"] == pytest.approx(math.sqrt(3 / 7 * 4 / 7 / 6))
    assert [sample["answer"] for sample in samples(request)] == own
    assert json.loads((request.payload / "results.json").read_text())["metrics"] == result.metrics
    assert [path.name for path in request.payload.iterdir()] == ["results.json"]
    assert "| dataset0/exact_match | 0.4286 ± 0.2020 | 7 |" in (request.meta / "report.md").read_text(encoding="utf-8")
    progress = [(event["step"], event["total"]) for event in events if event["type"] == "progress" and "answers" in event["message"]]
    assert progress == [(3, 7), (6, 7), (7, 7)]
    shown = [event for event in events if event["type"] == "sample"]
    assert len(shown) == 3
    assert "times" in shown[1]["data"]["prompt"]
    assert shown[1]["data"]["reference"] == rows[1].reference()


def test_answers_end_at_the_end_token(base: Input, tmp_path: Path) -> None:
    """A head that favours the end token makes rows end at different steps: they leave the batch, the rest goes on unharmed. It is the
    token with which the template ends turns, and neither the tokenizer nor the generation_config calls it an end."""
    folder = tmp_path / "ending"
    model = AutoModelForCausalLM.from_pretrained(save_pico(folder, seed=3, tied=False))
    words = tokenizer()
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id] *= 3
    model.generation_config.repetition_penalty = 1.8  # what a model suggests must not make greedy something else
    other = tokenizer()
    other.eos_token = other.pad_token = "<|endoftext|>"
    model.generation_config.eos_token_id = model.config.eos_token_id = other.eos_token_id
    model.save_pretrained(folder)
    other.save_pretrained(folder)
    ending = base.model_copy(update={"path": folder})
    rows = [chat(i, "x") for i in range(12)]
    request = request_for(tmp_path / "run", ending, rows, max_new_tokens=24)
    result, _ = run_program(request)
    model.generation_config.repetition_penalty = None
    own = [generated(model, row, 24) for row in rows]
    expected = [words.decode([token for token in ids if token not in ends(words)]) for ids in own]
    assert [sample["answer"] for sample in samples(request)] == expected
    stopped = sum(words.eos_token_id in ids for ids in own)
    assert stopped > 0
    assert result.metrics["dataset0/stopped"] == stopped / 12
    assert len({len(words(answer)["input_ids"]) for answer in expected}) > 3


def test_bits_per_byte_is_that_of_transformers(base: Input, tmp_path: Path) -> None:
    model, words = AutoModelForCausalLM.from_pretrained(base.path), tokenizer()
    plain = [Row(source="s", prompt=f"{i} and {i} are", completion=f" {2 * i}, naïvely", id=f"plain{i}") for i in range(3)]
    texts = [Row(source="s", text="One text, é and all. " * (i + 1), id=f"text{i}") for i in range(3)]
    result, _ = run_program(request_for(tmp_path, base, CHATS, plain, texts))

    expected, sizes = [0.0, 0.0, 0.0], [0, 0, 0]
    for row in [*CHATS, *plain]:
        tokens, which = tokenize(row, words, "completion"), int(row.messages is None)
        start = tokens.trained.index(True)
        end = start + tokens.input_ids[start:].index(words.eos_token_id)
        reference = str(row.reference())
        assert words.decode(tokens.input_ids[start:end]) == reference
        expected[which] += bits(model, tokens.input_ids, start, end)
        sizes[which] += len(reference.encode())
    for row in texts:
        ids = [words.bos_token_id, *words(row.text)["input_ids"]]
        expected[2] += bits(model, ids, 1, len(ids))
        sizes[2] += len(str(row.text).encode())
    for i in range(3):
        assert result.metrics[f"dataset{i}/bits_per_byte"] == pytest.approx(expected[i] / sizes[i], rel=1e-5)
        assert result.metrics[f"dataset{i}/bits_per_byte_stderr"] > 0
    assert {name for name in result.metrics if name.startswith("dataset2")} == {"dataset2/bits_per_byte", "dataset2/bits_per_byte_stderr"}


def test_an_adapter_is_scored_on_its_base(base: Input, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = save_adapter(base, tmp_path / "adapter")
    request = request_for(tmp_path / "run", adapter, CHATS, limit=4)
    run_program(request)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter.path)
    answers = [sample["answer"] for sample in samples(request)]
    rows = [CHATS[i * len(CHATS) // 4] for i in range(4)]  # evenly from all of them
    assert answers == [greedy(model, row) for row in rows]
    with model.disable_adapter():
        assert answers != [greedy(model, row) for row in rows]


def test_what_would_be_silently_wrong_is_stopped(base: Input, tmp_path: Path) -> None:
    nothing = save_adapter(base, tmp_path / "adapter", trained=False)
    fails(request_for(tmp_path / "a", nothing, CHATS), "bug", "the adapter changes nothing")
    other = base.model_copy(update={"template": "0" * 64})
    assert "tuneline verify" in fails(request_for(tmp_path / "b", other, CHATS), "data", "chat template").hint
    fails(request_for(tmp_path / "c", base, []), "data", "test split of data0 is empty")
    fails(request_for(tmp_path / "d", base, CHATS, max_new_tokens=2040), "config", "expected at most 2048")
    fails(request_for(tmp_path / "e", base, [Row(source="s", prompt="?", id="r")]), "data", "no test row of data0")
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(broken)
    tokenizer().save_pretrained(broken)
    fails(request_for(tmp_path / "f", base.model_copy(update={"path": broken}), CHATS), "bug", "not finite")


def test_prompts_without_completions_are_asked_and_have_no_bits(base: Input, tmp_path: Path) -> None:
    rows = [Row("sources.0", messages=({"role": "user", "content": f"{i}?"},), answer=str(i), id=f"m{i}", group=f"m{i}") for i in range(2)]
    rows += [Row("sources.0", prompt=f"{i} + {i} = ", answer=str(2 * i), id=f"p{i}", group=f"p{i}") for i in range(2)]
    request = request_for(tmp_path, base, rows, max_new_tokens=4)
    result, _ = run_program(request)
    assert result.metrics.keys() >= {"dataset0/exact_match", "dataset0/answer_recall"}
    assert "dataset0/bits_per_byte" not in result.metrics
    assert [sample["answer"] for sample in samples(request)][:2] == [
        greedy(AutoModelForCausalLM.from_pretrained(base.path), row, 4) for row in rows[:2]
    ]


def test_rows_without_a_reference_are_counted_out(base: Input, tmp_path: Path) -> None:
    silent = Row(source="s", messages=({"role": "user", "content": "Well?"},), id="silent")
    question, answer = CHATS[1].messages or ()
    untaught = Row(source="s", messages=(question, answer | {"weight": 0}), id="untaught")
    request = request_for(tmp_path, base, [CHATS[0], silent, untaught])
    result, events = run_program(request)
    assert [event["message"] for event in events if event["type"] == "warning"] == [
        "data0: 2 of 3 test rows have no answer to compare with, and are left out"
    ]
    assert result.info == {"rows": {"dataset0": 1}, "dtype": "float32"}
    assert set(result.metrics) == {
        f"dataset0/{name}" for name in ("exact_match", "answer_recall", "bits_per_byte", "stopped")
    }  # no spread of one


def test_a_task_of_reasoning_gym_scores_itself(base: Input, tmp_path: Path) -> None:
    import reasoning_gym

    row = Row(source="s", prompt="2 + 3 =", completion=" 5", answer="5", id="sum")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    entry = dict(reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0])
    rows = []
    for i, answer in enumerate([greedy(model, row).strip(), "5"]):
        scorer = {"dataset": "chain_sum", "entry": {**entry, "answer": answer}}
        rows.append(Row(source="s", prompt=row.prompt, answer=answer, extra={"scorer": scorer}, id=str(i)))
    request = request_for(tmp_path, base, rows)
    result, _ = run_program(request)
    assert next(sample["scores"]["score"] for sample in samples(request)) == 1.0
    assert result.metrics["dataset0/score"] < 1.0
    assert "dataset0/bits_per_byte" not in result.metrics  # an answer to compare with, but none that training would see


def test_benchmarks_of_ones_own(base: Input, tmp_path: Path) -> None:
    files = own_benchmarks(tmp_path / "own")
    fields: dict[str, Any] = {"files": files, "include_path": "own", "benchmarks": ["even", "said"]}
    request = request_for(tmp_path / "all", base, **fields)
    result, events = run_program(request)
    names = ("even/acc", "even/acc_stderr", "said/exact_match@first", "said/exact_match@first_stderr")
    assert set(result.metrics) == set(names)
    assert result.info["rows"] == {"even": 8, "said": 8}

    model, words = AutoModelForCausalLM.from_pretrained(base.path), tokenizer()
    right = 0
    for i in range(8):
        row = Row(source="s", messages=({"role": "user", "content": f"Is {i} even?"},))
        start = prompt_ids(row, words)
        yes, no = (bits(model, ids, len(start), len(ids)) for ids in (start + words(word)["input_ids"] for word in ("yes", "no")))
        right += (yes < no) == (i % 2 == 0)
    assert result.metrics["even/acc"] == right / 8
    shown = samples(request)
    assert len(shown) == 16
    assert shown[0]["prompt"].endswith("Is 0 even?<|im_end|>\n<|im_start|>assistant\n")
    assert any(event["type"] == "progress" and event["total"] == 16 for event in events)

    limited, _ = run_program(request_for(tmp_path / "limited", base, limit=3, apply_chat_template=False, **fields))
    assert limited.info["rows"] == {"even": 3, "said": 3}
    nothing = save_adapter(base, tmp_path / "adapter", trained=False)
    fails(request_for(tmp_path / "nothing", nothing, **fields), "bug", "the adapter changes nothing")


@pytest.mark.slow
def test_groups_and_unknown_benchmarks(base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = own_benchmarks(tmp_path / "own")
    result, _ = run_program(request_for(tmp_path / "group", base, files=files, include_path="own", benchmarks=["both"]))
    assert result.metrics["both/acc"] == result.metrics["even/acc"]
    assert "both/acc_stderr" in result.metrics
    managers = list[Any]()
    real = lm_eval.tasks.TaskManager.__init__
    monkeypatch.setattr(lm_eval.tasks.TaskManager, "__init__", lambda self, **options: (real(self, **options), managers.append(self))[0])
    failure = fails(request_for(tmp_path / "bad", base, benchmarks=["arc_eazy"]), "config", "benchmarks.0: found `arc_eazy`")
    assert failure.hint == "did you mean `arc_easy`?"

    # What plans read of lm-eval's 14,000 task files without it (`tuneline.workspace.benchmarks`) is what it reads itself.
    theirs, ours = managers[-1].task_index, task_files(Path(lm_eval.tasks.__file__).parent)
    assert theirs.keys() == ours.keys()
    assert len(ours) > 10_000
    for name, entry in theirs.items():
        if entry.cfg is None:
            assert set(ours[name]["tagged"]) == entry.tags
        else:
            assert of_data(ours[name]) == of_data(entry.cfg)


def of_data(config: Any) -> Any:
    """What a task file says about data, and a group about its members."""
    if not isinstance(config, dict):
        return [of_data(item) for item in config] if isinstance(config, list) else config
    code = {key: True for key in ("class", "custom_dataset") if config.get(key)}
    return code | {key: of_data(config[key]) for key in ("group", "task", "dataset_path", "dataset_kwargs") if config.get(key) is not None}


def test_data_of_a_benchmark_is_loaded_at_the_commit_of_the_key(base: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By task files and by code beside them; what is not in the key is in the report and warned of."""
    import datasets

    files = own_benchmarks(tmp_path / "own")
    own, real, loaded = files["include_path"][0], datasets.load_dataset, list[tuple[str, Any]]()
    for name in ("even", "said"):
        text = (own / f"{name}.yaml").read_text()
        (own / f"{name}.yaml").write_text(
            text.replace("dataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}", "dataset_path: owner/questions")
        )
    (own / "code.py").write_text(
        "from datasets import load_dataset\n\n\ndef rows(**_):\n    return load_dataset('owner/loose', revision='v1')\n"
    )
    (own / "coded.yaml").write_text(
        (own / "even.yaml")
        .read_text()
        .replace("task: even\ndataset_path: owner/questions", "task: coded\ncustom_dataset: !function code.rows")
    )

    def from_hub(path: str, name: str | None = None, revision: str | None = None) -> Any:
        loaded.append((path, revision))
        return real("json", data_files={"test": str(own / "questions.jsonl")})

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    fields: dict[str, Any] = {"files": files, "include_path": "own"}
    commits = {"benchmarks.0.owner/questions": "c" * 40}
    request = request_for(tmp_path / "pinned", base, benchmarks=["even", "said"], **fields).model_copy(update={"commits": commits})
    result, _ = run_program(request)
    assert loaded == [("owner/questions", "c" * 40)] * 2
    assert "unpinned" not in result.info
    result, events = run_program(request_for(tmp_path / "loose", base, benchmarks=["even", "coded"], **fields))
    assert loaded[2:] == [("owner/questions", None), ("owner/loose", "v1")]
    assert result.info["unpinned"] == ["owner/questions", "owner/loose@v1", "coded: code of its own loads it"]
    warned = [event["message"] for event in events if event["type"] == "warning"]
    assert warned == [f"data of benchmarks that is not in the key, and may change: {', '.join(result.info['unpinned'])}"]
    assert datasets.load_dataset is from_hub


@pytest.mark.slow
def test_the_same_report_again_and_in_another_process(base: Input, tmp_path: Path, elsewhere: Elsewhere) -> None:
    files = own_benchmarks(tmp_path / "own")
    adapter = save_adapter(base, tmp_path / "adapter")
    requests = [request_for(tmp_path / name, adapter, CHATS, files=files, include_path="own", benchmarks=["even"]) for name in ("a", "bb")]
    run_program(requests[0])
    elsewhere.run(requests[1])
    assert payload_digest(requests[0]) == payload_digest(requests[1])
    assert str(tmp_path) not in (requests[1].payload / "results.json").read_text()


def test_scores_of_text() -> None:
    assert exact_match(" 4 \n", "4") == 1.0
    assert exact_match("The answer is 4.", "4") == 0.0
    assert answer_recall("The answer is 4.", "4") == 1.0
    assert answer_recall("The answer is 45.", "4") == 0.0
    assert answer_recall("PARIS, of course", "Paris") == 1.0
    reference = '{"name": "Ada Ng", "people": 12, "window": true, "note": null, "days": ["Fri", "Sat"]}'
    assert answer_recall(reference, reference) == 1.0
    assert answer_recall("A table for 12, Ada Ng said, on Friday or Sat", reference) == pytest.approx(3 / 5)
    assert answer_recall("", reference) == 0.0
    assert answer_recall("{}", '{"a": null}') == 0.0


def test_averages_and_their_errors() -> None:
    assert mean([1.0]) == (1.0, None)
    value, error = mean([0.0, 1.0, 1.0, 1.0])
    assert (value, error) == (0.75, pytest.approx(0.25))  # sample deviation 0.5 over sqrt(4)
    value, error = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (value, error) == (2.0, 0.0)
    assert ratio([3.0, 1.0], [1.0, 3.0])[0] == 1.0
