"""Fixtures of the program tests."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import Elsewhere
from grpo_tools import undecided
from older import Older
from pico import save_pico, tokenizer
from program_tools import run_program
from sft_tools import request_for
from silent_tools import World, make_world
from strategy_tools import FIELDS
from vllm_tools import LAYERS, ROOM

from tasks.engine.client import Adapters, Engine
from tasks.engine.server import Place
from tasks.models.loading import template_hash
from tuneline.kinds.engine import EngineSettings
from tuneline.workspace.protocol import Input, Request

QUANTIZES = importlib.util.find_spec("gptqmodel") is not None  # the runtime `quantize`, which has none of the other programs' libraries


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    name = collection_path.name
    return True if name.endswith(".py") and name != "test_architectures.py" and (name == "test_quantize.py") != QUANTIZES else None


def pytest_collection_finish() -> None:
    """Has the garbage collector leave the libraries alone: accelerate has it look through all there is after each training, which takes
    longer than a pico model's training itself."""
    if "transformers" in sys.modules and not QUANTIZES:
        for name in ("tasks.training.sft_trainer", "tasks.training.grpo_trainer", "tasks.training.checkpoints", "tasks.evaluation.harness"):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one of several workers (`--dist loadgroup`), and all that use the server of vLLM, in their order."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("vllm" if item.path.stem.startswith("test_vllm") else item.path.stem))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = tmp_path_factory.mktemp("pico") / "model"
    return Input(path=save_pico(folder), digest="b" * 64, type="Model")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Another process, in which programs must write the same bytes."""
    process = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    yield process
    process.end()


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Older]:
    """transformers 4.57, in a process that all tests share."""
    process = Older(tmp_path_factory.mktemp("older"))
    yield process
    process.end()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """To be read only; `World.copy` is for tampering."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """A model that vLLM takes: on a CPU its heads are 32 wide or more."""
    made = undecided(tmp_path_factory.mktemp("taught") / "model", width=128)
    return made.model_copy(update={"template": template_hash(tokenizer())})


@pytest.fixture(scope="session")
def server(taught: Input, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for all tests of vLLM, in files that follow one another: a start takes half a minute. The last of them kills it."""
    settings = EngineSettings(enforce_eager=True, cpu_memory=0.25, start_timeout=600)
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with Engine(Place(vllm_python, log), taught.path, settings, "float32", ROOM, Adapters(4, LAYERS)) as engine:
        yield engine


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, base: Input) -> Request:
    """Trained by one process."""
    request = request_for(tmp_path_factory.mktemp("one") / "one", base, **FIELDS)
    run_program(request)
    return request
