"""A program that knows nothing of ours: loads exported folders by the code in their cards, and says what they answer.

python foreign.py    reads lines of JSON {"folder": ..., "prompts": [...], "tokens": N}, writes a line for each
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch

    assert not {"tuneline", "tasks", "flows"} & sys.modules.keys()
    for line in sys.stdin:
        asked = json.loads(line)
        os.chdir(asked["folder"])
        loaded: dict[str, Any] = {}
        code = Path("README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
        exec(code.replace('"BASE"', repr(asked.get("base"))), loaded)
        words, model = loaded["tokenizer"], loaded["model"].eval()
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
