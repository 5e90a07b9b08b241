"""Which large packages a stage sees, and what it says where one is missed. What real programs load: flow/test_pico.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_tools import ROOT, make_request

from tasks.packages import LARGE, needed
from tuneline.workspace.protocol import Input, Request

SFT = {"kind": "sft", "model": "base", "dataset": "words", "max_steps": 4}
GRPO = {"kind": "grpo", "model": "base", "dataset": "words", "max_steps": 4}
DATASET = {"kind": "dataset", "model": "base", "sources": [{"type": "files", "path": "words.jsonl"}]}
MINE = {"file": "mine.py", "function": "mine"}
PLAIN, GPTQ, BNB, CODE = (
    {},
    {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    None,
)


def request_for(folder: Path, config: dict[str, Any], model: dict[str, Any] | None) -> Request:
    """Of a stage whose model has the configuration `model`; None is a model that brings code."""
    path = folder / "base"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(model or {}))
    if model is None:
        (path / "modeling_mine.py").touch()
    return make_request(folder, config, {} if config["kind"] == "model" else {"model": Input(path=path, digest="", type="Model")})


@pytest.mark.parametrize(
    ("config", "model", "wanted"),
    [
        ({"kind": "model", "path": "m"}, PLAIN, "torch"),
        ({"kind": "model", "hub": "o/m", "trust_remote_code": True}, PLAIN, LARGE),
        (DATASET, PLAIN, ""),
        (DATASET, CODE, LARGE),
        (SFT, PLAIN, "torch"),
        (SFT, CODE, LARGE),
        (SFT, GPTQ, "torch"),
        (SFT, BNB, LARGE),
        ({**SFT, "method": "qlora"}, PLAIN, "bitsandbytes torch"),
        ({**SFT, "resources": {"processes": 2, "strategy": "zero1"}}, PLAIN, "deepspeed torch"),
        ({**SFT, "resources": {"processes": 2, "strategy": "fsdp"}}, PLAIN, "torch"),
        ({**SFT, "resources": {"processes": 2, "sequence_parallel_size": 2}}, PLAIN, "deepspeed torch"),
        ({**GRPO, "rewards": [{"type": "exact_match"}]}, PLAIN, "torch"),
        ({**GRPO, "rewards": [MINE]}, PLAIN, LARGE),
        ({"kind": "merge", "adapters": ["sft"]}, PLAIN, "torch"),
        ({"kind": "evaluate", "model": "m", "benchmarks": ["arc_easy"]}, PLAIN, "torch"),
        ({"kind": "evaluate", "model": "m", "benchmarks": ["mine"], "include_path": "mine"}, PLAIN, LARGE),
        ({"kind": "evaluate", "model": "m", "benchmarks": ["arc_easy"]}, GPTQ, "torch"),
        ({"kind": "quantize", "model": "m", "calibration": "words"}, PLAIN, "gptqmodel torch"),
    ],
)
def test_a_stage_sees_what_it_needs(
    tmp_path: Path, config: dict[str, Any], model: dict[str, Any] | None, wanted: str | tuple[str, ...]
) -> None:
    found = needed(request_for(tmp_path, config, model))
    assert found == (set(wanted) if isinstance(wanted, tuple) else set(wanted.split()))


HIDDEN = """\
import importlib.util, sys
from pathlib import Path
from tasks.__main__ import classify
from tasks.packages import hide
from tuneline.workspace.protocol import Request
request = Request.read(Path(sys.argv[1]))
hide(request)
assert importlib.util.find_spec("gptqmodel") is None
try:
    import gptqmodel
except ImportError as error:
    failure = classify(error, request)
print(failure.failure_class, failure.message, failure.hint, sep="\\n")
import deepspeed
"""


def test_a_package_that_is_missed_after_all_is_named(tmp_path: Path) -> None:
    request = request_for(tmp_path, {**DATASET}, PLAIN)
    request.write(tmp_path / "request.json")
    done = subprocess.run([sys.executable, "-c", HIDDEN, tmp_path / "request.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "bug",
        "ModuleNotFoundError: import of gptqmodel halted; None in sys.modules",
        f"see the log for the traceback; tasks/packages.py hides {', '.join(LARGE)} from this stage",
    ]
    assert "ModuleNotFoundError: import of deepspeed halted" in done.stderr
