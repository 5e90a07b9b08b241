"""Fields of LLaMA-Factory, axolotl, ms-swift, TRL and others, and what to write instead. Only data: `hints.py` reads it.

Names are lower-case, with underscores. A test compares them with the fields that exist.
"""

from __future__ import annotations

from tuneline.config.training_aliases import NONE, STORED, THINKING, TRAINING_ALIASES

TEMPLATE_FILE = "write `chat_template: FILE`, a Jinja template, or remove it: the model's own is used"

FIELD_ALIASES: dict[str, dict[str, str]] = TRAINING_ALIASES | {  # by the class of the fields; that of a subclass comes first
    "Stage": {
        **dict.fromkeys(("depends_on", "after", "dependencies", "deps"), "write `needs: [STAGE]`"),
        **dict.fromkeys(("name", "id"), "remove it: the name of a stage is the key above its fields"),
        **dict.fromkeys(("output", "outputs", "output_dir", "output_path", "save_path"), STORED),
        **dict.fromkeys(("num_gpus", "n_gpus", "n_gpu", "gpu"), "write `resources: {gpus: 1}`"),
        "type": "write `kind`",
        "stage": "write `kind`",
    },
    "ModelStage": {
        **dict.fromkeys(("model", "repo", "repo_id", "hub_id", "name", "base_model", "model_name_or_path", "model_id"), (
            "write `hub: owner/name`, or `path:` for a folder"
        )),
        **dict.fromkeys(("model_path", "folder", "dir"), "write `path`"),
        **dict.fromkeys(("dtype", "torch_dtype"), "write `dtype` in the stages that compute with the model"),
        **dict.fromkeys(("template", "chat_template_jinja", "chat_template_path"), TEMPLATE_FILE),
        **dict.fromkeys(("enable_thinking", "template_kwargs", "chat_template_args"), (
            "write `chat_template_kwargs: {enable_thinking: false}`"
        )),
        **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "write `method: qlora` in the training"),
        "token": "set HF_TOKEN in the environment",
    },
    "DatasetStage": {
        **dict.fromkeys(("path", "paths", "file_name", "file", "files", "data_files", "data_path"), (
            "write `sources: [{type: files, path: rows.jsonl}]`"
        )),
        **dict.fromkeys(("hf_hub_url", "repo", "hub", "dataset_name"), "write `sources: [{type: hub, repo: owner/name}]`"),
        **dict.fromkeys(("dataset_info", "dataset_dir", "datasets", "source", "dataset"), (
            "write `sources: [{type: files, path: rows.jsonl}]`; each source has its own format and columns"
        )),
        **dict.fromkeys(("format", "formatting", "columns", "tags"), "write `format` and `columns` in each of `sources:`"),
        **dict.fromkeys(("val_size", "val_set_size", "validation", "validation_split"), "write `split: {validation: 0.1}`"),
        **dict.fromkeys(("test_size", "test", "test_split"), "write `split: {test: 0.1}`"),
        **dict.fromkeys(("cutoff_len", "sequence_len", "max_seq_length"), (
            "write `max_length`, with `model:`, whose tokenizer counts tokens"
        )),
        **dict.fromkeys(("system_prompt", "default_system"), "write `system`"),
        **dict.fromkeys(("max_samples", "max_rows", "num_samples"), "write `max_rows` in each of `sources:`"),
        **dict.fromkeys(("interleave_probs", "mix_strategy", "weight", "weights"), "write `weight` in each of `sources:`"),
        "repeat": "write it in a source",
        **dict.fromkeys(("template", "chat_template", "tokenizer"), "write `model:`: its chat template and tokenizer are used"),
        **dict.fromkeys(("dedupe", "deduplicate"), "write `dedup: content`, prompt or none"),
        **dict.fromkeys(("num_workers", "preprocessing_num_workers", "streaming", "shuffle"), NONE),
    },
    "FilesSource": {
        **dict.fromkeys(("file_name", "file", "files", "data_files", "paths"), "write `path`"),
        **dict.fromkeys(("ds_type", "formatting", "chat_template"), "write `format`"),
        **dict.fromkeys(("mapping", "field_messages", "message_property_mappings", "column_mapping", "tags"), (
            "write `columns: {prompt: question, completion: solution}`"
        )),
        **dict.fromkeys(("split", "ratio"), "write `split:` in the stage: it holds rows out after reading all sources"),
    },
    "Source": {
        **dict.fromkeys(("max_samples", "num_samples", "limit", "sample", "samples", "head"), "write `max_rows`"),
        **dict.fromkeys(("system_prompt", "default_system"), "write `system`"),
        **dict.fromkeys(("repeats", "upsample", "oversample", "times", "epochs"), "write `repeat`"),
        **dict.fromkeys(("probability", "prob", "proportion", "sampling_weight", "weights"), "write `weight`"),
    },
    "HubSource": {
        **dict.fromkeys(("path", "name", "dataset", "hf_hub_url", "repo_id"), "write `repo: owner/name`"),
        **dict.fromkeys(("config", "config_name", "dataset_config_name"), "write `subset`"),
        **dict.fromkeys(("formatting", "chat_template"), "write `format`"),
        **dict.fromkeys(("mapping", "field_messages", "message_property_mappings", "column_mapping"), (
            "write `columns: {prompt: question, completion: solution}`"
        )),
    },
    "ReasoningGymSource": {
        "name": "write `task`",
        **dict.fromkeys(("count", "rows", "n"), "write `size`"),
        "seed": "write `seed` in the stage",
    },
    "CodeSource": {
        "system": "remove it: source code has no conversations",
        "format": "remove it: source code is plain text",
        "columns": "remove it: source code has no columns",
    },
    "EvaluateStage": {
        **dict.fromkeys(("batch_size", "per_device_eval_batch_size"), "write `resources: {micro_batch_size: 16}`"),
        **dict.fromkeys(("tasks", "task", "benchmark", "evals"), "write `benchmarks: [arc_easy]`: names of lm-eval tasks"),
        **dict.fromkeys(("dataset", "data", "eval_dataset", "test_dataset"), "write `datasets: [data]`: names of dataset stages"),
        **dict.fromkeys(("n_shot", "num_shots", "fewshot", "few_shot", "nshot"), "write `num_fewshot`"),
        **dict.fromkeys(("max_samples", "num_samples"), "write `limit`"),
        **dict.fromkeys(("max_length", "max_gen_toks", "max_tokens", "max_completion_length"), "write `max_new_tokens`"),
        **dict.fromkeys(("model_args", "model_name_or_path", "adapter", "pretrained", "model_path"), (
            "write `model:` with the name of a stage that gives a model or an adapter"
        )),
        **dict.fromkeys(("infer_backend", "engine"), "write `backend: vllm`"),
        **dict.fromkeys(("metric", "metrics"), "remove it: all metrics are computed; a stage of kind `gate` sets conditions on them"),
        **dict.fromkeys(("temperature", "do_sample", "top_p"), "remove it: answers to datasets are greedy"),
        **dict.fromkeys(("stop_words", "stop_strings", "stop_sequences", "until", "stopping_strings"), "write `stop`"),
        **dict.fromkeys(("enable_thinking", "chat_template_kwargs", "think_end_token"), (
            THINKING + "; thoughts are recognized automatically"
        )),
    },
    "GateStage": {
        **dict.fromkeys(("metric", "metrics", "threshold", "min", "max", "conditions", "requires", "of", "at_least", "at_most"), (
            "write `require: [{metric: data/exact_match, of: eval, at_least: 0.5}]`"
        )),
    },
    "Requirement": {
        **dict.fromkeys(("min", "minimum", "above", "gte", "ge", "threshold", "at_last"), (
            "write `at_least: 0.5`, or `at_most` for a maximum"
        )),
        **dict.fromkeys(("max", "maximum", "below", "lte", "le"), "write `at_most: 0.5`"),
        **dict.fromkeys(("stage", "model", "eval", "evaluation", "from"), "write `of:` with the name of the evaluation"),
        **dict.fromkeys(("baseline", "better_than", "compare_to"), "write `improves_on:` with the name of the other evaluation"),
        **dict.fromkeys(("accuracy", "acc", "exact_match"), "write `metric: data/exact_match` and `at_least: 0.5`"),
        **dict.fromkeys(("name", "value"), "write `metric: data/exact_match` and `at_least: 0.5`"),
    },
    "MergeStage": {
        **dict.fromkeys(("adapter", "adapter_name_or_path", "lora_model_dir"), "write `adapters: [sft]`"),
        **dict.fromkeys(("model", "base_model", "model_name_or_path"), "remove it: the adapter's base model is found automatically"),
        "export_size": "write `max_shard_size: 5GB`",
        "export_dir": STORED,
    },
    "QuantizeStage": {
        **dict.fromkeys(("dataset", "export_quantization_dataset", "calibration_dataset", "calibration_data"), "write `calibration`"),
        **dict.fromkeys(("export_quantization_bit", "quantization_bit", "wbits", "w_bit"), "write `bits`"),
        **dict.fromkeys(("groupsize", "q_group_size"), "write `group_size`"),
        **dict.fromkeys(("num_samples", "nsamples", "max_samples"), "write `samples`"),
    },
    "Split": {
        **dict.fromkeys(("val", "valid", "dev", "eval", "val_size"), "write `validation`"),
        "test_size": "write `test`",
        "train": "remove it: the rest is for training",
    },
    "Pipeline": {
        **dict.fromkeys(("steps", "tasks", "jobs"), "write `stages`"),
        **dict.fromkeys(("name", "id"), "remove it: the name of a pipeline is the key above its fields"),
        **dict.fromkeys(("schedule", "cron"), "write `schedules: {nightly: {cron: 0 2 * * *}}`"),
    },
    "Spec": {
        **dict.fromkeys(("pipeline", "stages", "steps", "tasks"), "write it under `pipelines: {NAME: {stages: ...}}`"),
        **dict.fromkeys(("variables", "params", "env"), "write `vars`"),
        **dict.fromkeys(("output_dir", "outputs", "cache", "cache_dir"), "write `store`: the folder of all artifacts"),
    },
}  # fmt: skip
