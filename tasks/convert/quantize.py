"""Quantizes a model by GPTQ and publishes it only if it is smaller, loads, and is about as good as before.

Rows of the calibration Dataset's train split, drawn with the seed and rendered as in training, are the calibration data. Perplexity is
measured, for the source and for the result, on all tokens of up to `MEASURED` rows that the model was not trained or calibrated on, each
row separately. `tasks.convert.quantizer` does the quantizing.

Left out: what `tasks.convert.quantizable` refuses, and the embedding and the output head (like all other weights, they stay in 16 bits).
A killed stage starts from scratch: gptqmodel's checkpoints of layers are not canonical.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.convert import quantizer
from tasks.convert.quantizable import Quantizable, block_count, headers, quantizable
from tasks.data import special_tokens
from tasks.data.masks import tokenize
from tasks.data.rows import Row, read_split
from tasks.models.chat_template import save_template, saved_template
from tasks.models.fetch import kept_files
from tasks.models.gptq import cosines, quantization
from tasks.models.loading import (
    check_device,
    compute_type,
    device,
    load_model,
    load_tokenizer,
    saved_config,
    saved_tokenizer,
    template_hash,
    write_json,
)
from tasks.models.older_readers import make_tokenizer_readable
from tasks.models.weights import INDEX, weight_files
from tuneline.errors import StageFailed
from tuneline.kinds.quantize import QuantizeStage
from tuneline.patches import patch
from tuneline.wording import markdown_table
from tuneline.workspace.file_names import REPORT_TEXT
from tuneline.workspace.protocol import Events, Input, Request, Result
from tuneline.workspace.reference import folder_of as model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MEASURED = 64  # rows that perplexity is measured on
PROMPT = 16  # tokens of the first row, for the check of the saved model
GENERATED = 4
LEAST_COSINE = 0.4
HINT = "use more samples, a smaller group_size, or 8 bits"


def run(request: Request, stage: QuantizeStage, events: Events) -> Result:
    quantizer.prepare()
    check_device(stage)
    source, payload = request.inputs["model"], request.payload
    folder = model_folder(source.path)
    tokenizer = load_tokenizer(source)
    dataset = request.inputs["calibration"]
    calibration = calibration_rows(dataset, tokenizer, stage, events)
    split, measured = measured_rows(dataset, tokenizer, stage)
    found = quantizable(source, stage)

    total, step = 2 + block_count(found.layers), count(1)
    loss_before = mean_loss(load_model(source, compute_type(stage)), measured)
    gc.collect()  # frees the source before gptqmodel loads it again
    events.progress(next(step), total, f"perplexity before: {perplexity(loss_before):.2f}")
    losses = quantizer.quantize(
        folder, calibration, stage, payload, request.meta, lambda: events.progress(next(step), total, "quantizing, block by block")
    )
    for file in kept_files(folder):  # tokenizer, template and generation settings, unchanged
        if file.suffix != ".safetensors" and file.name not in ("config.json", INDEX):
            target = payload / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if source.path != folder and (template := saved_template(source.path)) is not None:
        save_template(template, payload)
    make_tokenizer_readable(payload)  # except where only transformers 5 could read them
    rounded = quantizer.rounded(losses)
    if rounded:
        events.warning(f"{len(rounded)} layers saw too few tokens and are rounded to nearest, the first {rounded[0]}")

    quantized_layers = check_files(folder, payload, found, stage)
    check_weights(folder, payload, found)
    save_config(folder, payload)
    model = Input(path=payload, digest="", type="Model")
    quantized_model = load_model(model, compute_type(stage))
    loss, logits = mean_loss(quantized_model, measured), prompt_logits(quantized_model, measured[0])
    check_loss(loss_before, loss, stage)
    del quantized_model
    gc.collect()
    check_public_loader(payload, measured[0], logits, events)
    events.progress(total, total, f"perplexity after: {perplexity(loss):.2f}")

    before, after = weight_bytes(folder), weight_bytes(payload)
    metrics: dict[str, float] = {
        "perplexity_before": perplexity(loss_before),
        "perplexity": perplexity(loss),
        "perplexity_ratio": math.exp(loss - loss_before),
        "bytes_before": before,
        "bytes": after,
        "size_ratio": after / before,
        "quantized_layers": quantized_layers,
    }
    info = {
        "template": template_hash(saved_tokenizer(tokenizer, model)),
        "calibration": {"split": "train", "rows": len(calibration), "tokens": sum(map(len, calibration))},
        "perplexity": {"split": split, "rows": len(measured), "tokens": sum(len(ids) - 1 for ids in measured)},
        "rounded_to_nearest": len(rounded),
    }
    (request.meta / REPORT_TEXT).write_text(report(stage, metrics, info, losses, rounded), encoding="utf-8")
    return Result(metrics=metrics, info=info)


def save_config(source: Path, payload: Path) -> None:
    """Write the source's config.json with gptqmodel's quantization_config: transformers 5 has rewritten the other one."""
    before, after = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (source, payload))
    write_json(payload / "config.json", saved_config(before, after["dtype"], quantization_config=after["quantization_config"]))


# --- input ------------------------------------------------------------------------------------------------------------


def calibration_rows(dataset: Input, tokenizer: PreTrainedTokenizerBase, stage: QuantizeStage, events: Events) -> list[list[int]]:
    rows = read_split(dataset.path, "train")
    if not rows:
        raise StageFailed("data", f"the train split of {stage.calibration} is empty", "calibration uses its rows")
    if len(rows) < stage.samples:
        events.warning(f"{stage.calibration} has only {len(rows)} rows for calibration, fewer than samples: {stage.samples}")
    chosen = random.Random(stage.seed).sample(rows, min(stage.samples, len(rows)))
    return token_ids(chosen, tokenizer, stage)


def measured_rows(dataset: Input, tokenizer: PreTrainedTokenizerBase, stage: QuantizeStage) -> tuple[str, list[list[int]]]:
    """Return the split for perplexity, test or else validation, and its first rows. Never train, which calibrates."""
    for split in ("test", "validation"):
        rows = [ids for ids in token_ids(read_split(dataset.path, split)[:MEASURED], tokenizer, stage) if len(ids) > 1]
        if rows:
            return split, rows
    raise StageFailed(
        "data",
        f"{stage.calibration} has neither test nor validation rows to measure perplexity on",
        f"hold rows out: `split: {{test: 0.1}}` in {stage.calibration}",
    )


def token_ids(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stage: QuantizeStage) -> list[list[int]]:
    special_tokens.refuse(rows, tokenizer)
    return [tokenize(row, tokenizer, "all").input_ids[: stage.max_length] for row in rows]


# --- perplexity -------------------------------------------------------------------------------------------------------


def mean_loss(model: Any, rows: list[list[int]]) -> float:
    """Return the mean negative log-likelihood of a token, over all rows."""
    import torch

    total, tokens = 0.0, 0
    with torch.inference_mode():
        for ids in rows:
            batch = torch.tensor([ids], device=model.device)
            logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum"))
            tokens += len(ids) - 1
    return total / tokens


def prompt_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of a row's first tokens."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids[:PROMPT]], device=model.device)).logits[0].float().cpu()


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond, a float overflows


# --- hand-over checks -------------------------------------------------------------------------------------------------


def check_files(source: Path, payload: Path, found: Quantizable, stage: QuantizeStage) -> int:
    """Return the number of layers stored in `stage.bits` bits, by the files' headers."""
    settings = quantization(payload) or {}
    wanted = {"quant_method": stage.method, **stage.model_dump(include={"bits", "group_size", "sym", "desc_act"})}
    if other := {name: settings.get(name) for name, value in wanted.items() if settings.get(name) != value}:
        raise StageFailed("bug", f"config.json of the quantized model: found {other}, expected {wanted}")
    before, after, layers = headers(source, found.prefix), headers(payload), found.layers
    quantized = {name: shape for name, shape in layers.items() if f"{name}.qweight" in after}
    left = sorted(layers.keys() - quantized.keys())
    if left:
        raise StageFailed("bug", f"{len(left)} of {len(layers)} layers are not quantized, the first {left[0]}")
    expected = sum(2 * math.prod(tensor["shape"]) for name, tensor in before.items() if name.removesuffix(".weight") not in quantized)
    for name, (outputs, inputs) in quantized.items():
        groups = inputs // stage.group_size if stage.group_size > 0 else 1
        codes = outputs * inputs * stage.bits // 8
        if tensor_bytes(after[f"{name}.qweight"]) != codes:
            message = f"{name}: found {tensor_bytes(after[f'{name}.qweight'])} bytes, expected {codes} in {stage.bits} bits"
            raise StageFailed("bug", message)
        expected += codes + groups * outputs * 2 + groups * outputs * stage.bits // 8 + 4 * inputs  # scales, zeros, g_idx
    stored = sum(map(tensor_bytes, after.values()))
    if stored > expected:  # also if a tied output head was written twice
        message = f"the quantized model: found {stored:,} bytes, expected at most {expected:,}: {stage.bits} bits, and 16 for the rest"
        raise StageFailed("bug", message)
    return len(quantized)


def check_weights(source: Path, payload: Path, found: Quantizable) -> None:
    """Raises StageFailed(bug) unless the first outputs of each layer decode to about the direction of the source's weights.

    Perplexity alone would accept a layer of noise in a deep model. The smallest cosines in SmolLM2-135M: 0.989 with 4 bits in groups
    of 32, 0.74 with 2 bits in groups of 64; noise and zeros are near 0.
    """
    for name, cosine in cosines(source, payload, found.layers, found.prefix):
        if not cosine > LEAST_COSINE:  # also if it is NaN
            message = f"{name}: found a cosine of {cosine:.2f} between quantized and original weights, expected more than {LEAST_COSINE}"
            raise StageFailed("bug", message, HINT)


def tensor_bytes(tensor: dict[str, Any]) -> int:
    start, end = tensor["data_offsets"]
    return int(end - start)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def check_public_loader(payload: Path, ids: list[int], expected: torch.Tensor, events: Events) -> None:
    """Load the model as users would, by transformers and optimum with this device's kernels. It must generate, and agree with the model
    that perplexity was measured on, which on a CPU was decoded by `tasks.models.gptq`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    def load() -> Any:
        places: Any = {"": device()}
        return AutoModelForCausalLM.from_pretrained(
            payload, dtype=torch.float16, device_map=places, local_files_only=True, trust_remote_code=False
        ).eval()

    try:
        model = load()
    except AttributeError as error:  # GPT-2's initialization needs the weight of packed layers
        events.warning(f"transformers {__version__} alone does not load the quantized model ({error}); evaluations here do")
        config = AutoConfig.from_pretrained(payload, local_files_only=True, trust_remote_code=False)
        classes = AutoModelForCausalLM._model_mapping[type(config)].__mro__
        patch(next(each for each in classes if "_init_weights" in vars(each)), "_init_weights", lambda self, module: None)
        model = load()
    prompt = torch.tensor([ids[:PROMPT]], device=model.device)
    with torch.compiler.set_stance("force_eager"):  # compiling gptqmodel's kernels would take longer than they run here
        found = prompt_logits(model, ids)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GENERATED, do_sample=False)
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= 0.05 * scale:  # rounding of float16, layer by layer; also if it is NaN
        message = f"logits of the quantized model in transformers differ by up to {difference:.3g} from ours; the largest is {scale:.3g}"
        raise StageFailed("bug", message)


def check_loss(before: float, after: float, stage: QuantizeStage) -> None:
    if not after - before <= math.log(stage.max_perplexity_ratio):  # also if it is NaN
        raise StageFailed(
            "data",
            f"perplexity rose from {perplexity(before):.2f} to {perplexity(after):.2f}, "
            f"more than max_perplexity_ratio: {stage.max_perplexity_ratio}",
            HINT,
        )


def report(stage: QuantizeStage, metrics: dict[str, float], info: dict[str, Any], losses: dict[str, str], rounded: list[str]) -> str:
    calibration, measured = info["calibration"], info["perplexity"]
    worst = sorted(losses.keys() - set(rounded), key=lambda name: -float(losses[name]))[:5]
    compared = [
        ("perplexity", *(f"{metrics[name]:.3f}" for name in ("perplexity_before", "perplexity", "perplexity_ratio"))),
        ("bytes of weights", *(f"{metrics[name]:,.0f}" for name in ("bytes_before", "bytes")), f"{metrics['size_ratio']:.3f}"),
    ]
    return "\n".join(
        [
            f"# {stage.method.upper()}, {stage.bits} bits, group size {stage.group_size}",
            "",
            markdown_table(("", "before", "after", "ratio"), compared, right=True),
            "",
            f"{metrics['quantized_layers']:.0f} layers, calibrated on {calibration['rows']} rows ({calibration['tokens']:,} tokens) of "
            f"{stage.calibration}'s train split. Perplexity over {measured['rows']} rows ({measured['tokens']:,} tokens) of its "
            f"{measured['split']} split.",
            "",
            markdown_table(("largest errors", "loss"), ((name, losses[name]) for name in worst), right=True),
            "",
        ]
    )
