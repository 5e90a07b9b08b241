"""Fixtures of the program tests."""

from __future__ import annotations

import pytest
from pico import save_pico
from program_tools import run_program
from sft_tools import request_for
from strategy_tools import FIELDS

from tuneline.protocol import Input, Request


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = tmp_path_factory.mktemp("pico") / "model"
    return Input(path=save_pico(folder, vocabulary=9_700), digest="b" * 64, type="Model")  # enough for these rows


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, base: Input) -> Request:
    """Trained by one process."""
    request = request_for(tmp_path_factory.mktemp("one") / "one", base, **FIELDS)
    run_program(request)
    return request
