"""A program that knows nothing of ours: loads exported folders by transformers and PEFT, and says what they answer.

python foreign.py    reads lines of JSON {"folder": ..., "prompts": [...], "tokens": N}, writes a line for each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    assert not {"tuneline", "tasks", "flows"} & sys.modules.keys()
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])
        words = AutoTokenizer.from_pretrained(folder)
        if (folder / "adapter_config.json").exists():
            from peft import PeftConfig, PeftModel

            base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)
            model = PeftModel.from_pretrained(base, folder)
            model.generation_config = GenerationConfig.from_pretrained(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        model.eval()
        answers, first = [], []
        for prompt in asked["prompts"]:
            given = words(prompt, return_tensors="pt")
            with torch.inference_mode():
                first.append(model(**given).logits[0, -1, :8].tolist())
                written = model.generate(**given, max_new_tokens=asked["tokens"], do_sample=False)[0, given["input_ids"].shape[1] :]
            answers.append(words.decode(written, skip_special_tokens=True))
        ends = model.generation_config.eos_token_id
        found = {"answers": answers, "logits": first, "ends": ends, "dtype": str(next(model.parameters()).dtype)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
