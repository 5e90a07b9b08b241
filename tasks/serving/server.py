"""Runs vLLM's OpenAI-compatible server for `tuneline serve`: `python -m tasks.serving.server REQUEST DESCRIPTOR HOST PORT LOG`.

The request's inputs are the served models under their names: one base, under one or more, and adapters of it. The server gets the
tokenizer and the template that were trained, and of a generation config only the tokens that end answers, as evaluations do: requests
decide the rest. The key that clients must send is in the environment, where `ps` does not show it.

A line by the descriptor asks for the end; requests in progress are then finished first. Out go `ready`, `stopped` and `failed`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from shutil import copyfile
from typing import Any

from tasks.data.rendering import ends
from tasks.engine.client import CPU_BATCH, OUTPUT, RANKS, modules_of
from tasks.engine.server import AGAIN, Place, Server
from tasks.log_filters import silence
from tasks.models.loading import check_inputs, load_tokenizer, needs_remote_code, save_tokenizer, write_json
from tasks.packages import hide
from tasks.serving.lines import failed, own_stdout
from tuneline.errors import StageFailed
from tuneline.kinds.engine import EngineSettings
from tuneline.kinds.evaluate import EvaluateStage
from tuneline.watchdog import GRACE
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.reference import folder_of as model_folder

KEY = "TUNELINE_API_KEY"
CPU_LENGTH = 4096  # tokens of a prompt and its answer on a CPU, unless max_model_len is set
POLL = 0.5  # seconds between two looks at the server's process
FREE_MEMORY = 0.9  # share of the GPUs' memory, which a server does not share with a training
SERVED = "served"  # folder with tokenizer, template and generation config


def main() -> int:
    out = own_stdout()

    def say(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    request_file, descriptor, host, port, log = sys.argv[1:]
    request = Request.read(Path(request_file))
    silence()
    ending = threading.Event()
    threading.Thread(target=listen, args=(int(descriptor), ending), daemon=True).start()
    began = time.monotonic()
    try:
        check_inputs(request)
        hide(request)
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if request.stage().resources.gpus else None
        assert request.engine is not None
        server = Server(Place(request.engine, Path(log), gpus), arguments(request, gpus), settings_of(request).start_timeout)
        server.host, server.port, server.key, server.variables = host, int(port), os.environ.get(KEY, ""), {}  # no client may load adapters
        server.start()
        length = json.loads(server.ask("GET", "/v1/models"))["data"][0]["max_model_len"]
        say(type="ready", seconds=round(time.monotonic() - began, 1), names=list(request.inputs), length=length)
        while not ending.wait(POLL):
            if server.process is None or server.process.poll() is not None:
                raise server.ended("while it was serving")
        server.drain(GRACE)
        server.stop()
    except Exception as error:
        failure = failed(error)
        say(**failure | {"hint": failure["hint"].replace(AGAIN, "start it again")})
        return 1
    say(type="stopped")
    return 0


def listen(descriptor: int, ending: threading.Event) -> None:
    os.read(descriptor, 1)
    ending.set()


def settings_of(request: Request) -> EngineSettings:
    return request.stage().resources.engine or EngineSettings(gpu_memory_utilization=FREE_MEMORY)


def arguments(request: Request, gpus: list[str] | None) -> list[str]:
    """Return vLLM's arguments. Raises StageFailed(config) for a model that it cannot serve."""
    stage, settings = request.stage(), settings_of(request)
    assert isinstance(stage, EvaluateStage)
    bases = {name: source for name, source in request.inputs.items() if source.type == "Model"}
    adapters = {name: source for name, source in request.inputs.items() if source.type == "Adapter"}
    base = next(iter(bases.values()))
    folder, served = model_folder(base.path), request.work / SERVED
    if needs_remote_code(base):
        raise StageFailed(
            "config", "the model brings its own code, which vLLM would run", "`tuneline chat` runs it, if its stage allows it"
        )
    tokenizer = load_tokenizer(next(iter(adapters.values()), base))
    save_tokenizer(tokenizer, served)
    copyfile(folder / "config.json", served / "config.json")  # vLLM looks for it beside the tokenizer
    write_json(served / "generation_config.json", {"eos_token_id": ends(tokenizer, listed_ends(folder))})
    values: dict[str, Any] = {
        "model": folder, "tokenizer": served, "generation-config": served, "dtype": stage.dtype,
        "max-num-seqs": settings.max_num_seqs, "block-size": settings.block_size, "shutdown-timeout": max(0, int(GRACE) - 5),
        "disable-access-log-for-endpoints": "/health,/metrics",
    }  # fmt: skip
    length = settings.max_model_len
    if gpus is None:
        config = json.loads((folder / "config.json").read_bytes())
        length = length or min(CPU_LENGTH, config.get("max_position_embeddings", CPU_LENGTH))
        values |= {"kv-cache-memory-bytes": int(settings.cpu_memory * 2**30), "max-num-batched-tokens": max(length, CPU_BATCH)}
    else:
        values |= {"gpu-memory-utilization": settings.gpu_memory_utilization, "tensor-parallel-size": len(gpus)}
    values["max-model-len"] = length or -1  # as long as the GPUs have memory for
    switches = ["disable-fastapi-docs", *(["no-enable-chunked-prefill"] if gpus is None else [])]  # as in tasks.engine.client
    switches += ["enforce-eager"] if settings.enforce_eager else []
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None] + [f"--{name}" for name in switches]
    return [*flags, "--served-model-name", *bases, *(of_adapters(adapters) if adapters else ())]


def of_adapters(adapters: dict[str, Input]) -> list[str]:
    """Return vLLM's arguments for adapters that are served from the start. Raises StageFailed(config) for one that it cannot serve."""
    rank, modules = 0, set[str]()
    for name, source in adapters.items():
        config = json.loads((source.path / "adapter_config.json").read_bytes())
        changed = modules_of(source.path)
        experts = [each for each in config.get("target_parameters") or () if not each.endswith(".weight")]
        if OUTPUT in changed or experts:
            what = OUTPUT if OUTPUT in changed else "experts"
            raise StageFailed(
                "config", f"{name}: the adapter changes {what}, which vLLM does not serve", "merge it, and serve the merged stage"
            )
        rank, modules = max(rank, config["r"], *(config.get("rank_pattern") or {}).values()), modules | changed
    listed = [json.dumps({"name": name, "path": str(source.path)}) for name, source in adapters.items()]
    flags = ["--enable-lora", f"--max-loras={len(adapters)}", f"--max-lora-rank={next(known for known in RANKS if known >= rank)}"]
    return [*flags, "--lora-target-modules", *sorted(modules), "--lora-modules", *listed]


def listed_ends(folder: Path) -> Any:
    """Return eos_token_id as transformers reads it with the model: of its generation config, else of its config."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            return json.loads((folder / name).read_bytes()).get("eos_token_id")
    return None


if __name__ == "__main__":
    sys.exit(main())
