"""Computes first weights of LoRA that depend on the base's weights or on data: PiSSA, OLoRA and EVA, by PEFT, and LoftQ.

They are computed once for a training, from float32, and kept in its work folder, so that every attempt and every process starts from
the same ones. PiSSA and OLoRA move the principal part of each weight into the adapter: in training the base has the rest. LoftQ puts
what a base in 4 bits has lost into the adapter. The saved adapter must fit the unchanged base, so it gets twice the rank: the trained
part minus the initial one. LoftQ is not PEFT's, which needs a GPU, finds no weights under other names, and ignores the scaling.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import EvaConfig, PeftModel
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tasks.models.adapters import configuration
from tasks.models.targets import Targets
from tasks.models.weights import read_header, weight_files
from tasks.training import shared as training
from tuneline.errors import StageFailed
from tuneline.files import sync
from tuneline.kinds.adapters import Lora, Places
from tuneline.workspace.protocol import Input
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

NAME = "initial_adapter.safetensors"
BATCH_TOKENS = 2048  # at least, for EVA; independent of micro-batches, as the result must be
MOST_LOST = 0.5  # of a weight's norm; 4 bits lose a tenth
PASSES = 20  # over the rows, after which EVA is given up


def begin(trainer: Trainer, base: Input, settings: Places, found: Targets, rows: Dataset, folder: Path) -> dict[str, torch.Tensor]:
    """Initialize the adapter, run the hand-over's checks of its form, and return its first weights."""
    initialize(trainer, base, settings, found, rows, folder)
    before = training.adapter_tensors(trainer.model)
    training.check_before(trainer.model, settings, found, before)
    return before


def initialize(trainer: Trainer, base: Input, settings: Places, found: Targets, rows: Dataset, folder: Path) -> None:
    """Give the adapter its first weights, and take PiSSA's and OLoRA's from the base. `folder` keeps them between attempts.

    Raises StageFailed(config) where they cannot be computed.
    """
    if not isinstance(settings, Lora) or settings.init_lora_weights in (True, "gaussian"):
        return
    lora = settings
    file, model = folder / NAME, trainer.model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    check(lora, found, layers)
    with trainer.args.main_process_first(local=False), torch.no_grad():
        if not file.exists():  # the first process of the first attempt
            with torch.random.fork_rng():  # a later attempt does not draw these numbers
                torch.manual_seed(trainer.args.seed)
                if lora.init_lora_weights == "eva":
                    first = of_data(model, lora, found, rows, trainer.args.seed)
                else:
                    first = (
                        of_lost_bits(base, layers, model.get_base_model().base_model_prefix)
                        if lora.init_lora_weights == "loftq"
                        else of_weights(lora, layers)
                    )
            part = file.with_suffix(".part")
            save_file({name: tensor.float().cpu().contiguous() for name, tensor in first.items()}, part)
            sync(part)
            part.rename(file)
        start_from(load_file(file), lora, layers)


def check(lora: Lora, found: Targets, layers: dict[str, LoraLayer]) -> None:
    field = f"lora.init_lora_weights: found {lora.init_lora_weights}"
    if found.parameters:
        others = f"adapt only the other layers: `target_modules: [{', '.join(found.others())}]`"
        raise StageFailed(
            "config", f"{field}, which PEFT does not support for experts in one tensor, such as {min(found.parameters)}", others
        )
    for name, layer in layers.items():
        rank, most = (
            layer.r["default"],
            layer.in_features if lora.init_lora_weights == "eva" else min(layer.in_features, layer.out_features),
        )
        if rank > most:
            raise StageFailed(
                "config", f"{field} with rank {rank} for {name}, which has only {most} directions", f"set `r: {most}` or less"
            )
        if lora.init_lora_weights == "olora" and layer.fan_in_fan_out:  # peft/tuners/lora/layer.py, olora_init, does not transpose
            raise StageFailed("config", f"{field}, which PEFT computes wrongly for Conv1D layers such as {name}", "set `pissa`")


def of_weights(lora: Lora, layers: dict[str, LoraLayer]) -> dict[str, torch.Tensor]:
    """Return A and B of each layer by PiSSA or OLoRA, and leave the base's weights unchanged."""
    first: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = base.weight.data
        base.weight.data = weight.float().clone()
        if lora.init_lora_weights == "olora":
            layer.olora_init("default")
        else:
            layer.pissa_init("default", lora.init_lora_weights)
        base.weight.data = weight
        first |= {f"{name}.A": layer.lora_A["default"].weight, f"{name}.B": layer.lora_B["default"].weight}
    return first


def of_lost_bits(base: Input, layers: dict[str, LoraLayer], prefix: str) -> dict[str, torch.Tensor]:
    """Return A and B of each layer whose product is closest to what its weights have lost in 4 bits: one step of LoftQ. A layer that is
    not quantized starts as usual. `prefix`: of transformers' names, which files of a bare model lack."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    files = {name: file for file in weight_files(model_folder(base.path)) for name in read_header(file)}
    first: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        quantized = layer.get_base_layer()
        if isinstance(quantized, Linear4bit):
            stored = f"{name.removeprefix('base_model.model.')}.weight"
            stored = stored if stored in files else stored.removeprefix(f"{prefix}.")
            if stored not in files:
                message = f"lora.init_lora_weights: found loftq, and no {stored} in the base's files: transformers renames its weights"
                raise StageFailed("config", message, "remove it")
            with safe_open(files[stored], "pt") as file:
                weight = file.get_tensor(stored).to(a.device).float()
            weight = weight.T if issubclass(quantized.source_cls, Conv1D) else weight
            lost = weight - dequantize_4bit(quantized.weight.data, quantized.weight.quant_state).float()
            if lost.norm() > MOST_LOST * weight.norm():
                raise StageFailed(
                    "bug", f"{stored} of the base's files is not what was quantized", "please report this, with the model's name"
                )
            left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
            rank = layer.r["default"]
            root = (sizes[:rank] / layer.scaling["default"]).sqrt()
            a, b = root[:, None] * right[:rank], left[:, :rank] * root
        first |= {f"{name}.A": a, f"{name}.B": b}
    return first


def of_data(model: PeftModel, lora: Lora, found: Targets, rows: Dataset, seed: int) -> dict[str, torch.Tensor]:
    """Return A of each layer by EVA: the directions of its inputs with the most variance. Ranks stay as configured (`rho` of 1)."""
    config: Any = configuration(lora, found)
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    batches = Batches(rows, max(BATCH_TOKENS, 4 * lora.highest_rank()), seed)
    directions = get_eva_state_dict(model, batches, config, gather_distributed_inputs=False, show_progress_bar=False)
    return {f"{name}.A": tensor for name, tensor in directions.items()}


def start_from(first: dict[str, torch.Tensor], lora: Lora, layers: dict[str, LoraLayer]) -> None:
    for name, layer in layers.items():
        for part, matrix in (("A", layer.lora_A["default"]), ("B", layer.lora_B["default"])):
            if f"{name}.{part}" in first:
                matrix.weight.data = first[f"{name}.{part}"].to(matrix.weight.device)
        if lora.changes_base():
            weight = layer.get_base_layer().weight
            taken = layer.get_delta_weight("default")
            weight.data = (weight.data.float() - taken).to(weight.dtype)


class Batches:
    """The rows in an order by the seed, batch by batch, as EVA reads them until its directions no longer turn."""

    def __init__(self, rows: Dataset, tokens: int, seed: int):
        ids = list(zip(rows["input_ids"], rows["labels"], strict=True))
        random.Random(seed).shuffle(ids)
        self.batches: list[list[Any]] = [[]]
        for row in ids:
            self.batches[-1].append(row)
            if sum(label != -100 for _, labels in self.batches[-1] for label in labels) >= tokens:
                self.batches.append([])
        if len(self.batches) > 1:
            self.batches.pop()  # holds fewer tokens than the rest

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(PASSES):
            for batch in self.batches:
                columns = zip(*(map(torch.tensor, row) for row in batch), strict=True)
                ids, labels = (torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=-100) for column in columns)
                yield {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": labels}
        message = f"lora.init_lora_weights: found eva, whose directions still turn after {PASSES} passes over the train split"
        raise StageFailed("data", message, "lower `r`, or add rows: EVA needs more trained tokens than ranks")


def as_saved(tensors: dict[str, torch.Tensor], settings: Places, folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter for the unchanged base: A over A0 and B beside -B0, whose product is BA - B0 A0 (`subtract_mutated_init` of
    peft/tuners/lora/model.py)."""
    if not isinstance(settings, Lora) or not settings.starts_apart():
        return tensors
    first = load_file(folder / NAME)
    saved = {}
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            saved[name] = tensor
            continue
        module, _, part = name.removesuffix(".weight").rpartition(".lora_")
        start = first[f"{module}.{part}"]
        saved[name] = torch.cat([tensor, start], 0) if part == "A" else torch.cat([tensor, -start], 1)
    return saved
