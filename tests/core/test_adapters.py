"""Fields of adapters: what `validate` refuses, and what vLLM cannot serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneline.config.load import load
from tuneline.errors import ConfigError

FILE = """\
version: 1
pipelines:
  demo:
    stages:
      base: {{kind: model, path: model}}
      data: {{kind: dataset, sources: [{{type: files, path: a.jsonl}}]}}
      sft:  {{kind: sft, model: base, dataset: data, {fields}}}
      next: {{{after}}}
"""
AFTER = "kind: evaluate, model: sft, datasets: [data]"
VLLM = AFTER + ", backend: vllm"
MORE = "kind: sft, model: base, dataset: data, adapter: sft"
# fmt: off
REFUSED = {
    "a name for a list": ("lora: {target_modules: q_proj}", AFTER, "demo.sft.lora.target_modules: found the name q_proj, expected a list of names, all-linear, attention, mlp, attention+mlp or a regular expression that matches full names\n\nhint: write `target_modules: [q_proj]`"),
    "names with commas": ('vera: {exclude_modules: "q_proj, v_proj"}', AFTER, "demo.sft.vera.exclude_modules: found the name q_proj, v_proj, expected a list of names or a regular expression that matches full names\n\nhint: write `exclude_modules: [q_proj, v_proj]`"),
    "no expression": ("lora: {target_modules: '(q'}", AFTER, "demo.sft.lora.target_modules: found (q, which is no regular expression (missing ), unterminated subpattern at position 0), expected a list of names, all-linear, attention, mlp, attention+mlp or a regular expression that matches full names"),
    "another start": ("lora: {init_lora_weights: pisa}", AFTER, "demo.sft.lora.init_lora_weights: found pisa, expected true, gaussian, pissa, pissa_niter_N, olora, eva or loftq"),
    "no start": ("lora: {init_lora_weights: false}", AFTER, "demo.sft.lora.init_lora_weights: found false, expected true, gaussian, pissa, pissa_niter_N, olora, eva or loftq"),
    "loftq": ("lora: {init_lora_weights: loftq}", AFTER, "demo.sft.lora.init_lora_weights: found loftq with `method: lora`, expected `method: qlora`\n\nhint: set `method: qlora`: LoftQ starts from what a base in 4 bits has lost"),
    "loftq in 8 bits": ("method: qlora, bits: 8, lora: {init_lora_weights: loftq}", AFTER, "demo.sft.lora.init_lora_weights: found loftq with `bits: 8`, expected 4 bits\n\nhint: remove `bits`: LoftQ starts from what a base in 4 bits has lost"),
    "pissa with dora": ("lora: {init_lora_weights: pissa, use_dora: true}", AFTER, "demo.sft.lora.init_lora_weights: found pissa with use_dora, whose magnitudes PEFT cannot convert\n\nhint: remove one of them"),
    "pissa with patterns": ("lora: {init_lora_weights: pissa_niter_4, use_rslora: true, rank_pattern: {q_proj: 4}}", AFTER, "demo.sft.lora.init_lora_weights: found pissa_niter_4 with use_rslora and rank_pattern or alpha_pattern, which PEFT cannot convert\n\nhint: remove use_rslora, or the patterns"),
    "pissa with qlora": ("method: qlora, lora: {init_lora_weights: olora}", AFTER, "demo.sft.lora.init_lora_weights: found olora with `method: qlora`, which cannot subtract from quantized weights\n\nhint: set `method: lora`"),
    "eva sharded": ("lora: {init_lora_weights: eva}, resources: {strategy: zero3, processes: 2}", AFTER, "demo.sft.resources.strategy: found zero3 with lora.init_lora_weights: eva, which needs the whole model in one place\n\nhint: set `strategy: zero2`"),
    "a start without effect": ("", MORE + ", lora: {init_lora_weights: gaussian}", "demo.next.lora.init_lora_weights: found gaussian with `adapter`, whose weights are trained further\n\nhint: remove it"),
    "modules sharded": ("lora: {modules_to_save: [norm]}, resources: {strategy: zero3, processes: 2}", AFTER, "demo.sft.resources.strategy: found zero3 with lora.modules_to_save, which PEFT copies from unsharded weights\n\nhint: set `strategy: zero2`"),
    "tokens twice": ("add_tokens: [<a>, <b>, <a>]", AFTER, "demo.sft.add_tokens: found <a> twice\n\nhint: remove one of them"),
    "tokens of full": ("method: full, learning_rate: 1e-5, add_tokens: [<a>]", AFTER, "demo.sft.add_tokens: found add_tokens with `method: full`, which trains the model's own weights\n\nhint: remove it, or set `method: lora`"),
    "other tokens": ("add_tokens: [<a>]", MORE, "demo.next.adapter: found `sft`, which adds the tokens <a>, expected the same as this stage\n\nhint: write the same `add_tokens` in both, or merge the adapter first"),
    "two kinds": ("vera: {}, ia3: {}", AFTER, "demo.sft.ia3: found ia3 beside vera, expected one kind of adapter\n\nhint: remove one of them"),
    "beside lora": ("lora: {r: 8}, oft: {}", AFTER, "demo.sft.oft: found oft beside lora, expected one kind of adapter\n\nhint: remove one of them"),
    "vera with qlora": ("method: qlora, vera: {}", AFTER, "demo.sft.vera: found vera with `method: qlora`, expected lora\n\nhint: remove it, or set `method: lora`"),
    "adalora of dpo": ("", "kind: dpo, model: base, dataset: data, adalora: {}", "demo.next.adalora: found the unknown field `adalora`, expected a field of dpo\n\nhint: remove it: only `sft` trains AdaLoRA; `lora: {rank_pattern: {...}}` gives layers different ranks"),
    "adalora without an end": ("adalora: {}", AFTER, "demo.sft.adalora: found adalora without max_steps, by which its ranks are reduced\n\nhint: set `max_steps: 500`, for example"),
    "adalora without a middle": ("adalora: {tinit: 60, tfinal: 40}, max_steps: 100", AFTER, "demo.sft.adalora.tinit: found tinit 60 and tfinal 40 of 100 steps, which leaves none to reduce ranks in\n\nhint: lower one of them"),
    "adalora that takes none": ("adalora: {target_r: 12}, max_steps: 100", AFTER, "demo.sft.adalora.target_r: found 12, expected less than init_r, 12\n\nhint: `lora:` has ranks that stay"),
    "adalora sharded": ("adalora: {}, max_steps: 100, resources: {strategy: zero2, processes: 2}", AFTER, "demo.sft.resources.strategy: found zero2 with adalora, whose ranks PEFT allots only with ddp\n\nhint: remove it"),
    "adalora trained further": ("adalora: {}, max_steps: 100", MORE + ", adalora: {}, max_steps: 100", "demo.next.adalora: found adalora with `adapter`, whose ranks are allotted\n\nhint: merge the adapter first"),
    "adalora with qlora": ("adalora: {}, max_steps: 100, method: qlora", AFTER, "demo.sft.adalora: found adalora with `method: qlora`, expected lora\n\nhint: remove it, or set `method: lora`"),
    "adalora served": ("adalora: {}, max_steps: 100", VLLM, "demo.next.model: found `sft` with adalora, but vLLM serves only LoRA\n\nhint: set `backend: transformers`"),
    "oft sharded": ("oft: {}, resources: {strategy: zero3, processes: 2}", AFTER, "demo.sft.resources.strategy: found zero3 with oft, which PEFT computes from unsharded weights\n\nhint: set `strategy: zero2`"),
    "eps without effect": ("oft: {eps: 1e-4}", AFTER, "demo.sft.oft.eps: found 0.0001 without coft, which alone uses it\n\nhint: remove it, or set `coft: true`"),
    "scales of others": ("ia3: {target_modules: [k_proj], feedforward_modules: [up_proj]}", AFTER, "demo.sft.ia3.feedforward_modules: found up_proj, expected some of target_modules: k_proj"),
    "another kind trained further": ("vera: {}", MORE, "demo.next.adapter: found `sft`, which trains `vera`, expected `lora`\n\nhint: configure `vera` here too"),
    "a ratio for rewards": ("", "kind: grpo, model: base, dataset: data, rewards: [{type: exact_match}], lora: {lora_plus_ratio: 4}", "demo.next.lora.lora_plus_ratio: found 4 for grpo, expected 1\n\nhint: remove it"),
    "vera served": ("vera: {}", VLLM, "demo.next.model: found `sft` with vera, but vLLM serves only LoRA\n\nhint: set `backend: transformers`"),
}
# fmt: on
TAKEN = [
    ("lora: {target_modules: attention+mlp, layers_to_transform: [0], rank_pattern: {q_proj: 64}}", VLLM),
    ("lora: {init_lora_weights: pissa, r: 256}", VLLM),
    ("method: qlora, lora: {init_lora_weights: loftq}", VLLM),
    ("vera: {}", "kind: sft, model: base, dataset: data, adapter: sft, vera: {vera_dropout: 0.1}"),
    ("lora: {modules_to_save: [embed_tokens]}, add_tokens: []", "kind: merge, adapters: [sft]"),
]


def problems(folder: Path, fields: str, after: str) -> list[str]:
    file = folder / "pipelines.yaml"
    file.write_text(FILE.format(fields=fields, after=after))
    try:
        load(file)
    except ConfigError as error:
        return [str(problem).partition(": ")[2] for problem in error.problems]
    return []


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_or_the_stage_cannot_do_is_refused(tmp_path: Path, name: str) -> None:
    fields, after, expected = REFUSED[name]
    assert expected in problems(tmp_path, fields, after)


@pytest.mark.parametrize(("fields", "after"), TAKEN)
def test_what_works_is_taken(tmp_path: Path, fields: str, after: str) -> None:
    assert problems(tmp_path, fields, after) == []


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ("lora: {modules_to_save: [norm]}", "modules_to_save"),
        ("add_tokens: [<a>]", "new tokens"),
        ("lora: {rank_pattern: {q_proj: 600}}", "rank 600"),
        ("lora: {init_lora_weights: olora, r: 300}", "rank 600"),
    ],
)
def test_what_vllm_does_not_serve_is_said(tmp_path: Path, fields: str, what: str) -> None:
    (found,) = problems(tmp_path, fields, VLLM)
    assert what in found
