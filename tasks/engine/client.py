"""Runs vLLM as a program's engine: it samples and scores token ids, with a base model and adapters that are loaded and unloaded.

    with Engine(Place(request.engine, work / "engine.log"), model, settings, "float32", 512, Adapters(rank=16)) as engine:
        engine.load("step-1", adapter)
        completions = engine.generate(prompts, Sampling(max_tokens=64, temperature=1.0), model="step-1", seed=0)

Ids go in and ids come out: no text is tokenized again, which would give other ids. Log-probabilities are those of the model's own
distribution, before temperature and top_p. Of the model's generation_config.json only the end tokens are used: its penalties
and temperature would change the distribution. Each prompt is one request to the server, which batches them.

Left out: models that bring their own code, and images. `tasks.engine.server` starts and stops the server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from safetensors import safe_open

from tasks.engine.server import Place, Server
from tuneline.errors import StageFailed
from tuneline.kinds.engine import EngineSettings

BASE = "base"  # the base model's name among the adapters' names
ADAPTERS = 2  # loaded at the same time: a new one is loaded before the old one is unloaded
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's kernels support (`MaxLoRARanks` in vllm/config/lora.py)
OUTPUT = "lm_head"
CPU_BATCH = 2048  # prompt tokens that are computed together
TOKENS_A_CHUNK = 16  # between two progress reports: each costs a message


@dataclass(frozen=True)
class Adapters:
    """Adapters that an engine has room for."""

    rank: int
    """The largest of their ranks."""
    modules: Collection[str] | None = None
    """Last parts of the names of the adapted layers, by default all that vLLM supports: an unadapted layer costs time and memory, too."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, under vLLM's names (`SamplingParams`). Temperature 0 is greedy.

    A completion ends at the model's own end tokens, at `stop_token_ids`, and with the token that completes one of the texts in `stop`.
    """

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request. An empty `stop` is left out."""
        given: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        given |= {"top_k": self.top_k, "stop_token_ids": list(self.stop_token_ids)}
        return given | ({"stop": list(self.stop)} if self.stop else {})


@dataclass
class Completion:
    """Holds what was sampled. If an end token ended it (`finish_reason` "stop"), that token is the last of `ids`, with its
    log-probability: vLLM omits it from the text, not from the ids. "length" means that max_tokens were reached."""

    model: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Score:
    """Scores a sequence's tokens from the second on: the first one has no context."""

    logprobs: list[float]
    greedy: list[bool]
    """Whether no other token was more likely."""


class Engine:
    """Starts a vLLM server and asks it for completions and scores.

    `max_model_len` counts a prompt and its completion, or a scored sequence plus one token.
    """

    def __init__(
        self, place: Place, model: Path, settings: EngineSettings, dtype: str, max_model_len: int, adapters: Adapters | None = None
    ):
        self.max_model_len = settings.max_model_len or max_model_len
        arguments = {
            "model": model, "served-model-name": BASE, "dtype": dtype, "max-model-len": self.max_model_len,
            "max-num-seqs": settings.max_num_seqs, "generation-config": "vllm", "logprobs-mode": "raw_logprobs",
            "block-size": settings.block_size,
        }  # fmt: skip
        if place.gpus is None:
            arguments["kv-cache-memory-bytes"] = int(settings.cpu_memory * 2**30)
            arguments["max-num-batched-tokens"] = max(self.max_model_len, CPU_BATCH)
        else:
            copies = settings.data_parallel
            arguments |= {"gpu-memory-utilization": settings.gpu_memory_utilization, "tensor-parallel-size": len(place.gpus) // copies}
            arguments |= {"data-parallel-size": copies} if copies > 1 else {}
        switches = ["disable-uvicorn-access-log", "disable-log-stats", "disable-fastapi-docs"]
        if place.gpus is None:  # vLLM 0.32 ends on a CPU if a prompt with its own seed is split ("Generator does not use offset")
            switches.append("no-enable-chunked-prefill")
        if settings.enforce_eager:
            switches.append("enforce-eager")
        if adapters is not None:
            arguments |= {"max-lora-rank": next(rank for rank in RANKS if rank >= adapters.rank), "max-loras": ADAPTERS}
            switches.append("enable-lora")
        flags = [f"--{name}={value}" for name, value in arguments.items() if value is not None] + [f"--{name}" for name in switches]
        self._modules = None if adapters is None or adapters.modules is None else set(adapters.modules)
        if self._modules is not None:
            flags += ["--lora-target-modules", *sorted(self._modules)]
        self._scores = adapters is None or (self._modules is not None and OUTPUT not in self._modules)
        self._server = Server(place, flags, settings.start_timeout)
        self._requests = settings.max_num_seqs * settings.data_parallel
        self._names: set[str] = {BASE}  # every name that was ever used
        self._loaded: set[str] = set()

    def __enter__(self) -> Engine:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.stop()

    @property
    def address(self) -> tuple[int, str]:
        """Return port and key, for `join` in another process of the same training."""
        return self._server.port, self._server.key

    def join(self, address: tuple[int, str]) -> None:
        """Use the server that another process has started and will stop."""
        self._server.port, self._server.key = address

    def load(self, name: str, folder: Path) -> None:
        """Load a PEFT adapter under a name never used before: vLLM caches what it computed for a prompt by the adapter's name, and
        would reuse another adapter's results."""
        if name in self._names or len(self._loaded) == ADAPTERS:
            hint = f"each adapter needs a new name, and at most {ADAPTERS} are loaded at once"
            raise StageFailed("bug", f"cannot load the adapter {name} beside {sorted(self._loaded)}", hint)
        self._names.add(name)
        if self._modules is not None and (more := modules_of(folder) - self._modules):
            expected = f"expected only {', '.join(sorted(self._modules))}"
            raise StageFailed("bug", f"the adapter {name}: found weights for {', '.join(sorted(more))}, {expected}")
        self._server.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        self._loaded.add(name)

    def unload(self, name: str) -> None:
        self._server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._loaded.discard(name)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        model: str,
        seed: int | Sequence[int] = 0,
        done: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt, in order.

        A single `seed` is the first prompt's; each further prompt's is one more, so the same prompt twice gets two answers.
        `done` is called with the number of finished completions and of tokens, by one thread at a time. The same seeds give the
        same tokens as long as the batches are the same: which prompts are computed together changes the last bits of the logits.
        """
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        progress, new = _Progress(done), sampling.max_tokens
        if (longest := max(map(len, prompts), default=0) + new) > self.max_model_len:  # vLLM would silently give fewer tokens
            message = f"found a prompt that takes {longest} tokens with its {new} new ones, expected at most {self.max_model_len}"
            raise StageFailed("config", message, "raise `max_model_len` of `resources: {engine: ...}`, or remove it")

        def one(prompt: Sequence[int], own_seed: int) -> Completion:
            completion = Completion()
            for choice in self._choices({"model": model, "prompt": list(prompt), "seed": own_seed, **sampling.fields()}):
                completion.model = choice["model"]
                completion.ids += choice["token_ids"]
                completion.logprobs += choice["logprobs"]["token_logprobs"]
                completion.finish_reason = choice["finish_reason"]
                progress.add(len(choice["token_ids"]), finished=choice["finish_reason"] is not None)
            if completion.finish_reason not in ("stop", "length") or len(completion.ids) != len(completion.logprobs):
                found = f"{len(completion.ids)} ids, {len(completion.logprobs)} log-probabilities, ended by {completion.finish_reason}"
                raise StageFailed("bug", f"vLLM returned an incomplete completion: {found}")
            return completion

        return self._all(one, list(zip(prompts, seeds, strict=True)))

    def score(self, sequences: Sequence[Sequence[int]], model: str) -> list[Score]:
        """Score each token of the sequences, in order. `max_model_len` must be one more than the longest sequence.

        With adapters, their `modules` must be given without the output layer: vLLM 0.32 ends on a CPU when it scores a prompt
        under an adapter that may change that layer (it counts the sampled rows, not those of the prompt).
        """
        if not self._scores:
            raise StageFailed("bug", f"an engine whose adapters may change {OUTPUT} cannot score", "name their `modules`")

        def one(sequence: Sequence[int]) -> Score:
            body = {"model": model, "prompt": list(sequence), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
            choice = json.loads(self._server.ask("POST", "/v1/completions", body))["choices"][0]
            given = [found[str(token)] for token, found in zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True)]
            return Score([entry["logprob"] for entry in given], [entry["rank"] == 1 for entry in given])

        return self._all(one, [(sequence,) for sequence in sequences])

    def _choices(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of a completion as they arrive, each with the name of the model that made it."""
        body |= {"stream": True, "stream_interval": TOKENS_A_CHUNK, "logprobs": 0, "return_token_ids": True}
        for event in self._server.stream("/v1/completions", body):
            if event["model"] != body["model"]:
                raise StageFailed("bug", f"vLLM: found an answer of model {event['model']}, expected {body['model']}")
            for choice in event["choices"]:
                yield choice | {"model": event["model"]}

    def _all(self, one: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run all calls, as many at once as the server works on. The first failure cancels the waiting ones."""
        with ThreadPoolExecutor(self._requests) as pool:
            futures = [pool.submit(one, *call) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _Progress:
    def __init__(self, done: Callable[[int, int], None] | None):
        self.done, self.lock, self.finished, self.tokens = done, threading.Lock(), 0, 0

    def add(self, tokens: int, finished: bool) -> None:
        with self.lock:
            self.tokens, self.finished = self.tokens + tokens, self.finished + finished
            if self.done is not None:
                self.done(self.finished, self.tokens)


def modules_of(adapter: Path) -> set[str]:
    """Return the last parts of layer names: `q_proj` for `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        return {name.partition(".lora_")[0].removesuffix(".weight").rpartition(".")[2] for name in tensors.keys()}  # noqa: SIM118  (it is no mapping)
