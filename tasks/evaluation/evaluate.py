"""Scores a model, or an adapter on its base, on the test splits of datasets and on lm-eval's benchmarks.

lm-eval scores both: `tasks.evaluation.harness` is its Hugging Face model, `tasks.evaluation.harness_vllm` the same with vLLM as the
engine. A dataset's rows are asked as they were trained on: the prompt is rendered through the template saved on the trained side, and
compared token by token with `tasks.data.masks`. The stage fails if an adapter changes nothing or is only partly read, or if the template
differs from the trained one.

Several processes each run all of this, but compute only some of the batches (`tasks.evaluation.sharing`); the first one reports.

Left out: benchmarks that run the model's code, except human_eval; images and sound.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data import special_tokens
from tasks.data.masks import in_the_order_of, prompt_ids, with_reference
from tasks.data.rendering import prompt_text, render_text
from tasks.data.rows import Row, read_split
from tasks.data.thoughts import said
from tasks.data.unrendered import complete, lost_in_asking
from tasks.evaluation.benchmarks import first_question, load_benchmarks, longest_of_benchmarks, run_benchmarks
from tasks.evaluation.code_benchmark import NAME as HUMAN_EVAL
from tasks.evaluation.code_benchmark import info as human_eval_info
from tasks.evaluation.likelihoods import answers_to_compare, bits_and_bytes, check_length, preferences, to_score
from tasks.models.loading import check_device, compute_type, load_model, load_tokenizer
from tasks.scoring.scores import TAIL, Report, Sample, answer_recall, exact_match, mean, ratio, task_score
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.wording import markdown_table
from tuneline.workspace.file_names import REPORT_TEXT, SAMPLES
from tuneline.workspace.protocol import Events, Input, Request, Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.evaluation.harness import LanguageModel

SHOWN = 3  # samples that are emitted as events


def run(request: Request, stage: EvaluateStage, events: Events) -> Result:
    from tasks.evaluation.sharing import Share

    be_quiet()
    share = Share(None if stage.uses_engine() else stage.resources)  # first: with several GPUs this selects the process's own
    if not share.first:
        events = Events(Path(os.devnull))
    check_device(stage)
    source = request.inputs["model"]
    tokenizer = load_tokenizer(source)
    datasets = [test_rows(request.inputs[f"datasets.{i}"], stage, name, tokenizer, events) for i, name in enumerate(stage.datasets)]
    benchmarks, unpinned = load_benchmarks(request, stage, tokenizer, events) if stage.benchmarks else (None, [])
    prompt = first_prompt(datasets[0][0], tokenizer) if datasets else first_question(benchmarks, tokenizer)

    report = Report()
    with ExitStack() as stack:
        lm: LanguageModel
        if stage.uses_engine():
            from tasks.evaluation.harness_vllm import EngineModel

            lm = EngineModel(source, tokenizer, request.seed, events)
            lengths = [longest_request(rows, stage, lm) for rows in datasets]
            lengths += [longest_of_benchmarks(benchmarks, stage, request.seed, lm)] if benchmarks else []
            stack.enter_context(lm.serve(request, stage, max(lengths)))
            lm.check(prompt)
        else:
            from tasks.evaluation.harness import LanguageModel

            model, batch = load_model(source, compute_type(stage)), stage.micro_batch_size()
            assert batch is not None
            lm = LanguageModel(model, tokenizer, batch, request.seed, events, share)
            check_logits(lm.model, model, prompt, source)
            lm.check_generation(prompt)
        if stage.benchmarks and stage.apply_chat_template:
            check_rendering(lm, tokenizer)
        for i, (name, rows) in enumerate(zip(stage.datasets, datasets, strict=True)):
            score_dataset(f"dataset{i}", name, rows, stage, lm, report, events)
        if benchmarks:
            run_benchmarks(benchmarks, stage, request.seed, lm, report, events)
    if share.first:
        write(request, report)
    for sample in report.samples[:SHOWN]:
        events.sample(f"{sample.prompt}\n--- answer: {sample.answer}\n--- reference: {sample.reference}", asdict(sample))
    info: dict[str, Any] = {"rows": report.rows, "dtype": stage.dtype}
    if unpinned:
        info["unpinned"] = unpinned
    if HUMAN_EVAL in stage.benchmarks:
        info[HUMAN_EVAL] = human_eval_info()
    return Result(metrics=report.metrics, info=info)


def be_quiet() -> None:
    """Disable progress bars, and the process pool for standard errors. Must be called before lm-eval is imported."""
    os.environ |= {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}


def test_rows(dataset: Input, stage: EvaluateStage, name: str, tokenizer: PreTrainedTokenizerBase, events: Events) -> list[Row]:
    """Return the rows to score, each with its reference as its answer."""
    rows = read_split(dataset.path, "test")
    if not rows:
        raise StageFailed("data", f"the test split of {name} is empty", f"hold rows out: `split: {{test: 0.1}}` in {name}")
    # Evenly spaced: the first rows would all come from the first source.
    count = min(stage.limit or len(rows), len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    special_tokens.refuse(chosen, tokenizer)
    return [with_reference(row, tokenizer) for row in complete(chosen, tokenizer, stage.on_unrendered, events, lost_in_asking)]


def first_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return prompt_ids(row, tokenizer) or list(tokenizer(row.text)["input_ids"])


def check_logits(scored: PreTrainedModel, model: PreTrainedModel, prompt: list[int], source: Input) -> None:
    """Raises StageFailed(bug) if, on a real prompt, logits of the model that lm-eval holds are not finite, or the adapter changes none."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        logits = scored(input_ids=ids).logits
        if not logits.isfinite().all():
            raise StageFailed("bug", "the model's logits are not finite", "the training diverged, or the weights overflow their type")
        if source.type == "Adapter":
            with model.disable_adapter():
                base = model(input_ids=ids).logits
            if torch.equal(logits, base):
                hint = "it was not trained, or was not loaded: check the loss of its training"
                raise StageFailed("bug", "the adapter changes nothing: logits with and without it are the same", hint)


def check_rendering(lm: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StageFailed(bug) unless lm-eval renders benchmark questions through the model's own template."""
    question = [{"role": "user", "content": "Well?"}]
    if lm.apply_chat_template(question) != render_text(question, Row("benchmark"), tokenizer, add_generation_prompt=True):
        raise StageFailed("bug", "lm-eval renders questions through another chat template than the model's")


# --- datasets ---------------------------------------------------------------------------------------------------------


def score_dataset(slot: str, name: str, rows: list[Row], stage: EvaluateStage, lm: LanguageModel, report: Report, events: Events) -> None:
    """Add a dataset's figures and samples under its `slot`, which stays the same if the dataset is renamed."""
    prompts = [prompt_text(row, lm.tokenizer) for row in rows]
    samples = [Sample(slot, row.id, prompt[-TAIL:], "", row.answer or row.text or "") for row, prompt in zip(rows, prompts, strict=True)]
    asked = [i for i, row in enumerate(rows) if row.answer is not None]
    lm.phase = f"{name}: answers"
    given, stopped = answers([rows[i] for i in asked], stage, lm)
    for i, answer in zip(asked, given, strict=True):
        right, final = samples[i].reference, said(answer, prompts[i], lm.tokenizer)
        if rows[i].calls():
            final = in_the_order_of(rows[i], final, lm.tokenizer)
        samples[i].answer = answer
        samples[i].scores |= {"exact_match": exact_match(final, right, rows[i].calls()), "answer_recall": answer_recall(final, right)}
        if "scorer" in rows[i].extra:
            samples[i].scores["score"] = task_score(final, rows[i].extra["scorer"])
    lm.phase = f"{name}: bits per byte"
    for i, (bits, size) in bits_and_bytes(rows, lm).items():
        samples[i].scores |= {"bits": bits, "bytes": size}
    lm.phase = f"{name}: pairs"
    for i, preferred in preferences(rows, lm).items():
        samples[i].scores |= preferred

    scored = [sample for sample in samples if sample.scores]
    if not scored:
        raise StageFailed("data", f"no test row of {name} has an answer to compare with", "rows need an answer, a completion or text")
    if len(scored) < len(rows):
        events.warning(f"{name}: {len(rows) - len(scored)} of {len(rows)} test rows have no answer to compare with, and are left out")
    for metric in ("exact_match", "answer_recall", "score", "preference_accuracy", "preference_accuracy_norm"):
        if values := [sample.scores[metric] for sample in scored if metric in sample.scores]:
            report.add(f"{slot}/{metric}", mean(values))
    if measured := [sample.scores for sample in scored if "bits" in sample.scores]:
        report.add(f"{slot}/bits_per_byte", ratio([scores["bits"] for scores in measured], [scores["bytes"] for scores in measured]))
    if asked:
        report.add(f"{slot}/stopped", mean([1.0] * stopped + [0.0] * (len(asked) - stopped)))
    report.rows[slot] = len(scored)
    report.samples += scored


def answers(rows: Sequence[Row], stage: EvaluateStage, lm: LanguageModel) -> tuple[list[str], int]:
    """Return greedy answers as in `tasks.data.thoughts.written`, in order, and how many ended with an end token or a stop text. Raises
    StageFailed(bug) if lm-eval tokenizes a prompt differently than training did."""
    from lm_eval.api.instance import Instance

    found: dict[int, str] = {}
    stopped = 0
    for templated in (True, False):
        lm.add_bos_token = False if templated else None  # a template writes its own; plain text uses the tokenizer's default
        chosen = [i for i, row in enumerate(rows) if (row.messages is not None) == templated]
        texts = [prompt_text(rows[i], lm.tokenizer) for i in chosen]
        for i, text in zip(chosen, texts, strict=True):
            ids = prompt_ids(rows[i], lm.tokenizer)
            if lm.tok_batch_encode([text])[0][0].tolist() != ids:
                raise StageFailed(
                    "bug", f"the prompt of row {rows[i].id} is not tokenized as in training", "please report this, with the template"
                )
            check_length(rows[i], len(ids) + stage.max_new_tokens, lm, "shorten the dataset's max_length, or max_new_tokens")
        options = {"do_sample": False, "max_gen_toks": stage.max_new_tokens, "until": list(stage.stop)}
        requests = [Instance("generate_until", {}, (text, dict(options)), 0) for text in texts]
        if requests:
            found |= dict(zip(chosen, lm.write(requests), strict=True))
            stopped += lm.stopped
    return [found[i] for i in range(len(rows))], stopped


def longest_request(rows: Sequence[Row], stage: EvaluateStage, lm: LanguageModel) -> int:
    """Return the tokens of the longest prompt plus answer, or of the longest scored sequence plus the token that vLLM samples."""
    asked = [len(prompt_ids(row, lm.tokenizer)) + stage.max_new_tokens for row in rows if row.answer is not None]
    scored = to_score(rows, lm)[0] + answers_to_compare(rows, lm.tokenizer)[0]
    return max(asked + [len(context) + len(continuation) + 1 for _, context, continuation in scored], default=0)


# --- output -----------------------------------------------------------------------------------------------------------


def write(request: Request, report: Report) -> None:
    document = json.dumps({"metrics": report.metrics, "rows": report.rows}, sort_keys=True, indent=1, allow_nan=False)
    (request.payload / "results.json").write_text(document + "\n", encoding="utf-8")
    with (request.meta / SAMPLES).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(sample), ensure_ascii=False, default=str) + "\n" for sample in report.samples)
    lines = []
    for name, value in sorted(report.metrics.items()):
        if not name.endswith("_stderr"):
            error = report.metrics.get(f"{name}_stderr")
            rows = report.rows.get(name.split("/")[0], "")
            lines.append((name, f"{value:.4f}{'' if error is None else f' ± {error:.4f}'}", rows))
    (request.meta / REPORT_TEXT).write_text(markdown_table(("metric", "value", "rows"), lines, right=True) + "\n", encoding="utf-8")
