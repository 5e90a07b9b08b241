"""A program that knows nothing of ours: loads an exported folder by vLLM, with the model's own generation config, and says what it answers.

Reads a line of JSON {"model": ..., "adapter": ... or null, "prompts": [...], "tokens": N}, writes a line.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.stdin.readline())
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked["adapter"] else None
    llm = LLM(
        asked["model"], dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=2**28, enable_lora=adapter is not None,
        max_lora_rank=8,
    )  # fmt: skip
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens = 0.0, asked["tokens"]
    outputs = [each.outputs[0] for each in llm.generate(asked["prompts"], sampling, lora_request=adapter)]
    ends = llm.model_config.try_get_generation_config()["eos_token_id"]
    print(json.dumps({"answers": [each.text for each in outputs], "ends": ends}), flush=True)


if __name__ == "__main__":
    main()
