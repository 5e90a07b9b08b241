"""Loads and runs lm-eval's benchmarks by name: its own, and those of a folder of task files.

Calls `lm_eval.evaluate` instead of `simple_evaluate`, which asks git, the machine and the hub about themselves. Limit and seed, which
`simple_evaluate` would set, are set here.

Left out: images and sound, and benchmarks that run the model's code, except `human_eval` (`tasks.evaluation.code_benchmark`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation.code_benchmark import NAME as HUMAN_EVAL
from tasks.evaluation.code_benchmark import human_eval
from tasks.sandbox import run as sandbox
from tasks.scoring.scores import TAIL, Report, Sample
from tuneline.errors import StageFailed
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.workspace.benchmarks import CODE, READERS, Data
from tuneline.workspace.protocol import Events, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.evaluation.harness import LanguageModel


def load_benchmarks(request: Request, stage: EvaluateStage, tokenizer: PreTrainedTokenizerBase, events: Events) -> tuple[Any, list[str]]:
    """Return lm-eval's tasks and groups by name, with their documents, and the data that no commit pins. Relative paths in a user's task
    are relative to the task's file."""
    from lm_eval.tasks import TaskManager

    if stage.apply_chat_template and tokenizer.chat_template is None:
        raise StageFailed("config", "the model has no chat template for the benchmarks", "set `apply_chat_template: false`")
    wanted: list[Any] = [name for name in stage.benchmarks if name != HUMAN_EVAL]
    folder = request.files["include_path"][0] if stage.include_path else None
    with contextlib.chdir(folder or "."):
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=False)
        if not set(wanted) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=str(folder) if folder else None)  # 12 s: it reads 15000 files
        for i, name in enumerate(stage.benchmarks):
            if name not in manager.all_tasks and name != HUMAN_EVAL:
                from tuneline.wording import nearest

                hint = nearest(name, manager.all_tasks) or "`python -m lm_eval ls tasks` lists them; your own tasks need include_path"
                raise StageFailed("config", f"benchmarks.{i}: found `{name}`, expected names of lm-eval's tasks", hint)
        if HUMAN_EVAL in stage.benchmarks:
            sandbox.check()
            wanted.append(human_eval(events, chat=stage.apply_chat_template))
        with pinned(request.commits) as loose:
            loaded = manager.load(wanted)
    loose += [f"{name}: {CODE}" for name, task in loaded["tasks"].items() if name != HUMAN_EVAL and loads_itself(task)]
    if loose:
        events.warning(f"data of benchmarks that is not in the key, and may change: {', '.join(loose)}")
    for name, task in loaded["tasks"].items():
        if task.get_config("unsafe_code"):
            raise StageFailed("config", f"benchmark {name} runs code that the model writes", f"remove it: only {HUMAN_EVAL} has a sandbox")
        own = task.get_config("num_fewshot")
        if own == 0 and stage.num_fewshot:
            events.warning(f"{name} sets num_fewshot: 0 itself, which is used")
        elif stage.num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=stage.num_fewshot or 0)
        task.set_fewshot_seed(seed=request.seed)
    return loaded, loose


@contextlib.contextmanager
def pinned(commits: Mapping[str, str]) -> Iterator[list[str]]:
    """Load repositories at the commits in the key. Yields labels of what else is loaded from a network.

    lm-eval's tasks, and the code beside their files, call `datasets.load_dataset`, which is replaced within the context: a revision in
    `dataset_kwargs` reaches neither tasks of groups nor that code (lm-eval 0.4.13).
    """
    import datasets

    known = {field.split(".", 2)[2]: commit for field, commit in commits.items()}
    real, loose = datasets.load_dataset, list[str]()

    def load(path: str, *given: Any, **options: Any) -> Any:
        revision = options.get("revision") or "main"
        label = Data(path, revision).label
        if commit := known.get(label):
            options["revision"] = commit
        elif "://" in str(options) or (path not in READERS and not Path(path).exists()):
            loose.append(label)
        return real(path, *given, **options)

    datasets.load_dataset = load
    try:
        yield loose
    finally:
        datasets.load_dataset = real


def loads_itself(task: Any) -> bool:
    from lm_eval.api.task import ConfigurableTask

    return type(task) is not ConfigurableTask or callable(task.config.custom_dataset)


def first_question(benchmarks: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    task = next(iter(benchmarks["tasks"].values()))
    return list(tokenizer(json.dumps(task.eval_docs[0], default=str))["input_ids"])


def longest_of_benchmarks(loaded: Any, stage: EvaluateStage, seed: int, lm: LanguageModel) -> int:
    """Return the tokens of the longest request: a question with its answer, or a scored sequence with one token before and after it."""
    from lm_eval.models.utils import normalize_gen_kwargs

    lengths: list[int] = []
    for task in loaded["tasks"].values():
        task.build_all_requests(
            limit=stage.limit,
            apply_chat_template=stage.apply_chat_template,
            fewshot_as_multiturn=stage.apply_chat_template,
            chat_template=lm.apply_chat_template if stage.apply_chat_template else None,
        )
        for instance in task.instances:
            if instance.request_type == "generate_until":
                text, options = instance.args
                lengths.append(len(lm.tok_encode(text)) + normalize_gen_kwargs(options, lm.max_gen_toks)["max_gen_toks"])
            else:
                lengths.append(len(lm.tok_encode("".join(instance.args))) + 2)
        task.set_fewshot_seed(seed=seed)  # requests are built again later, with the same examples
    return max(lengths)


def run_benchmarks(loaded: Any, stage: EvaluateStage, seed: int, lm: LanguageModel, report: Report, events: Events) -> None:
    from lm_eval.evaluator import evaluate
    from transformers import set_seed

    set_seed(seed)
    lm.phase, lm.add_bos_token = "benchmarks", False if stage.apply_chat_template else None
    lm.thinks = lm.thinks and stage.apply_chat_template
    results = evaluate(
        lm,
        loaded,
        limit=stage.limit,
        bootstrap_iters=1000,  # for metrics without a formula for the standard error; 100 times faster than the default
        apply_chat_template=stage.apply_chat_template,
        fewshot_as_multiturn=stage.apply_chat_template,
    )
    for name, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not chosen or isinstance(value, str):
                continue  # lm-eval's own notes, and N/A
            suffix = "_stderr" if metric.endswith("_stderr") else ""
            full = f"{name}/{metric.removesuffix('_stderr')}{'' if chosen == 'none' else '@' + chosen}{suffix}"
            if math.isfinite(value):
                report.metrics[full] = float(value)
            else:
                events.warning(f"{full} is {value} and is left out")
    for name, samples in results["samples"].items():
        report.rows[name] = results["n-samples"][name]["effective"]
        for sample in samples:
            asked, answer = sample["arguments"][0][0], json.dumps(sample["filtered_resps"], default=str)
            scores = {metric: sample[metric] for metric in sample["metrics"]}
            report.samples.append(Sample(name, str(sample["doc_id"]), str(asked)[-TAIL:], answer, str(sample["target"]), scores))
