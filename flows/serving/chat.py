"""Asks one or several models the same questions, one after another, each with its own conversation."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flows.machine import visible_gpus
from flows.run.slots import Slots, Taken
from flows.serving.program import LineProgram
from tuneline.errors import StageFailed
from tuneline.kinds.stage import Resources
from tuneline.planning.built import Built, input_of_model, request_of
from tuneline.workspace.artifact import Artifact
from tuneline.workspace.history import input_of
from tuneline.workspace.protocol import Request
from tuneline.workspace.runtimes import ready_runtime
from tuneline.workspace.workspace import Workspace

PROGRAM = "tasks.serving.chat"


class Display(Protocol):
    """Receives an exchange while it happens."""

    def question(self, messages: list[dict[str, Any]]) -> None: ...
    def begins(self, name: str) -> None: ...
    def text(self, text: str, thoughts: bool) -> None: ...
    def answer(self, answer: dict[str, Any]) -> None: ...


@dataclass
class Member:
    """A model with its conversation so far."""

    built: Built
    program: LineProgram
    templated: bool
    """Whether it has a chat template. Without one it continues each text, and remembers nothing."""
    messages: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Exchange:
    question: list[dict[str, Any]]
    reference: str | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The fields of `tasks.serving.answers.Answer`, and `stage`."""


class Conversation:
    """`settings` are those that the user has given, under the names of `Sampling`."""

    def __init__(self, members: list[Member], settings: dict[str, Any], system: str | None, dataset: str | None):
        self.members, self.settings, self.dataset = members, settings, dataset
        self.set_system(system)

    def set_system(self, system: str | None) -> None:
        """Begin again with another system prompt. Raises StageFailed(config) for a model without a chat template."""
        for member in self.members:
            if system is not None and not member.templated:
                message = f"{member.built.name}: found a system prompt, but the model has no chat template: it continues texts"
                raise StageFailed("config", message, "put the instructions into the question")
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget all questions and answers."""
        for member in self.members:
            member.messages.clear()

    def ask(self, text: str, display: Display) -> Exchange:
        exchange = Exchange([{"role": "user", "content": text}])
        for member in self.members:
            system = [{"role": "system", "content": self.system}] if self.system else []
            asked = {"messages": [*system, *member.messages, *exchange.question]}
            answer = self._answer(member, asked, self.settings, exchange, display)
            member.messages += [*exchange.question, {"role": "assistant", "content": answer["said"]}]
        return exchange

    def ask_row(self, row: str, display: Display) -> Exchange:
        """Ask a row of the dataset's test split, as the model's evaluation on it asks. It does not become part of the conversation."""
        exchange = Exchange([])
        for member in self.members:
            evaluation = member.built.evaluation
            as_evaluated: dict[str, Any] = {}
            if self.dataset in evaluation.datasets:
                as_evaluated = {"max_new_tokens": evaluation.max_new_tokens, "stop": list(evaluation.stop)}
            self._answer(member, {"row": row}, as_evaluated | self.settings, exchange, display)
        return exchange

    def _answer(
        self, member: Member, asked: dict[str, Any], settings: dict[str, Any], exchange: Exchange, display: Display
    ) -> dict[str, Any]:
        """Pass an answer on to the display. The first Ctrl-C stops this answer; a second one before its end raises KeyboardInterrupt."""
        begun = False
        with _stopping(member.program):
            member.program.send({"ask": asked, "settings": settings})
            while True:
                document = member.program.receive()
                kind = document.pop("type")
                if kind == "question":
                    exchange.reference = exchange.reference or document["reference"]
                    if not exchange.question:
                        exchange.question = document["messages"]
                        display.question(exchange.question)
                    continue
                if not begun:
                    display.begins(member.built.name)
                    begun = True
                if kind == "text":
                    display.text(**document)
                else:
                    answer = {"stage": member.built.name, **document}
                    exchange.answers.append(answer)
                    display.answer(answer)
                    return answer


@contextmanager
def _stopping(program: LineProgram) -> Iterator[None]:
    """Let the first Ctrl-C stop the program's answer."""
    usual = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        program.send({"stop": True})
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def members(workspace: Workspace, models: list[Built], dataset: Artifact | None, say: Callable[[str], None]) -> Iterator[list[Member]]:
    """Load the models, all at the same time; end their programs with the context. Several models share the GPUs."""
    most: Resources = max((built.evaluation.resources for built in models), key=lambda resources: resources.gpus)
    with ExitStack() as stack:
        taken = stack.enter_context(Slots(None, visible_gpus()).taken(most.gpus, most.devices, {"stage": "chat"}, say))
        programs = []
        for built in models:
            gpus = Taken(taken.gpus[: built.evaluation.resources.gpus], taken.descriptors)
            python = ready_runtime(built.evaluation.runtime, workspace.loaded.spec, workspace.root).python
            programs.append(stack.enter_context(LineProgram(PROGRAM, python, _requests(workspace, built, dataset), gpus)))
        yield [Member(built, program, program.receive()["template"]) for built, program in zip(models, programs, strict=True)]


def _requests(workspace: Workspace, built: Built, dataset: Artifact | None) -> Callable[[Path], Request]:
    inputs = {"model": input_of_model(workspace, built)}
    if dataset is not None:
        inputs["dataset"] = input_of(workspace.store, dataset)
    return lambda folder: request_of(built, inputs, folder)
