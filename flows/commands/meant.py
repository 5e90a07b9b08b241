"""Hints for unknown commands and options: what a user of another tool most likely means."""

from __future__ import annotations

import click

COMMANDS = {
    "ask": "chat", "build": "run", "check": "validate", "clean": "gc", "config": "validate", "create": "init", "delete": "gc",
    "describe": "show", "diff": "plan", "dry-run": "plan", "execute": "run", "explain": "plan", "get": "show", "help": "--help",
    "history": "runs", "infer": "chat", "info": "show", "inspect": "show", "install": "setup", "kill": "cancel", "log": "logs",
    "ls": "list", "new": "init", "open": "show", "pipelines": "list", "prune": "gc", "ps": "status", "queue": "submit", "report": "show",
    "restart": "run", "resume": "run", "retry": "run", "rm": "gc", "schedule": "deploy", "server": "up", "start": "run", "stop": "cancel",
    "tail": "logs", "test": "validate", "top": "status", "ui": "up", "version": "--version", "watch": "status", "workers": "worker",
}  # fmt: skip
STAGES = {
    "benchmark": "evaluate", "convert": "merge", "data": "dataset", "dataset": "dataset", "dpo": "dpo", "eval": "evaluate",
    "evaluate": "evaluate", "finetune": "sft", "fine-tune": "sft", "gate": "gate", "grpo": "grpo", "kto": "kto",
    "merge": "merge", "quantize": "quantize", "rl": "grpo", "sft": "sft", "train": "sft",
}  # fmt: skip
OPTIONS = {
    "--config": "`--file FILE` names the pipelines file",
    "--dry-run": "`tuneline plan` shows what a run would do",
    "--debug": "`--verbose` shows the programs' own output",
    "--follow": "`tuneline logs PIPELINE --follow` follows a run",
    "--no-cache": "`--force STAGE` builds a stage again",
    "--output": "`--json` prints JSON",
    "--resume": "runs resume from their last checkpoint automatically",
    "--skip": "`--only STAGE` runs a stage and its upstream stages",
    "--stage": "`--only STAGE` runs a stage and its upstream stages",
    "--watch": "`tuneline logs PIPELINE --follow` follows a run",
}


def hint(error: click.UsageError) -> str:
    """Return what to write instead, or an empty string if `--help` is the best hint."""
    command = error.ctx.command.name if error.ctx else ""
    if isinstance(error, click.exceptions.NoSuchCommand):
        name = error.command_name.lower()
        if name in STAGES:
            return f"`tuneline run PIPELINE` builds every stage; `--only STAGE` builds one of kind {STAGES[name]} and its upstream stages"
        return f"`tuneline {COMMANDS[name]}`" if name in COMMANDS else ""
    if isinstance(error, click.NoSuchOption):
        return OPTIONS.get(error.option_name, "")
    message = error.format_message()
    if message.startswith("Missing argument 'PIPELINE"):
        return "`tuneline list` names the pipelines of the file"
    if message.startswith("Got unexpected extra argument") and command in ("run", "plan", "submit"):
        return f"`tuneline {command} PIPELINE --only STAGE` runs one stage and its upstream stages; `--set STAGE.FIELD=VALUE` sets a field"
    return ""
