"""Writes a model or an adapter as a folder that others load: weights, tokenizer, template, generation config with the stops of an
evaluation, and a model card. Nothing in it refers to the store.

    model     its files, or its weights cast to another type
    adapter   its files. PEFT finds the base by the name in adapter_config.json: the hub's, or `base`, the folder beside it
    merged    what the kind `merge` writes

Files are copied, not linked: editing the folder must not change the store. Where the file system can share blocks, a copy takes no room.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from tasks.convert import merge
from tasks.convert.card import model_card
from tasks.convert.made import Made
from tasks.convert.merge_checks import check_tensors
from tasks.convert.push import open_repository
from tasks.convert.usage import Adapter
from tasks.data.endings import check_ends, save_configs
from tasks.models.loading import load_tokenizer, needs_remote_code, write_json
from tasks.models.weights import stored_tensors
from tuneline.errors import StageFailed
from tuneline.kinds.export import ExportStage
from tuneline.kinds.merge import MergeStage
from tuneline.secrets import masked
from tuneline.workspace.artifact import Manifest, sizes
from tuneline.workspace.cards import with_author_text
from tuneline.workspace.file_names import BASE, CARD, MANIFEST, PAYLOAD, REPORT_TEXT, SBOM
from tuneline.workspace.history import manifests_in_history
from tuneline.workspace.protocol import Events, Input, Request, Result
from tuneline.workspace.reference import REFERENCE
from tuneline.workspace.reference import folder_of as model_folder


def run(request: Request, stage: ExportStage, events: Events) -> Result:
    source, folder = request.inputs["of"], request.payload
    manifests = manifests_in_history(request.history, source.path.parents[3])
    hub = hub_base(source, manifests)
    if stage.push and source.type == "Adapter" and not (stage.merge or hub):
        found = f"push: the base of the adapter `{stage.of}` is not on the hub, so that others could not load it from there"
        raise StageFailed("config", found, "set `merge: true`, or take the base from the hub")
    push = open_repository(stage, events) if stage.push else None
    metrics: dict[str, float] = {}
    adapter = None
    if stage.merge:
        as_merge = MergeStage(kind="merge", adapters=(stage.of,), dtype=stage.dtype, max_shard_size=stage.max_shard_size)
        merged = merge.run(request.model_copy(update={"inputs": {"adapters.0": source}}), as_merge, events)
        metrics["max_logit_difference"] = merged.metrics["max_logit_difference"]
    elif source.type == "Adapter":
        adapter = write_adapter(source, hub, stage, folder, events)
    else:
        write_model(source, folder, stage, events)
    card = model_card(Made(stage, manifests, request.history, adapter, needs_remote_code(source), metrics.get("max_logit_difference")))
    for file in request.files.get("intended", []):
        card = with_author_text(card, file.read_text(encoding="utf-8"))
    (folder / CARD).write_bytes(masked(card.encode()))
    (request.meta / REPORT_TEXT).write_bytes(masked(card.partition("---\n\n")[2].encode()))
    for file in request.files.get("sbom", []):
        shutil.copyfile(file, folder / SBOM)
    events.progress(1, 2, "written")
    info = {"pushed": push(folder)} if push else {}
    events.progress(2, 2, f"pushed to {stage.push}" if push else "done")
    files = sizes(folder)
    return Result(metrics={**metrics, "bytes": sum(size for _, size in files), "files": len(files)}, info=info)


def hub_base(source: Input, manifests: dict[str, Manifest]) -> tuple[str, str] | None:
    """Return repository and commit of the base of an adapter; None if it has another source, or was trained here."""
    assert source.path.name == PAYLOAD
    own = Manifest.model_validate_json((source.path.parent / MANIFEST).read_bytes())
    base = manifests.get(f"{own.base.kind}/{own.base.key}") if own.base else None
    repository = base.document["config"].get("hub") if base and base.kind == "model" else None
    return (repository, base.document["commits"]["hub"]) if base and repository else None


def write_model(source: Input, folder: Path, stage: ExportStage, events: Events, tokenizer_of: Input | None = None) -> None:
    """Write a Model. Answers end where those of `tokenizer_of` do: an adapter's, for the base that is exported with it."""
    origin = model_folder(source.path)
    cast = stage.dtype != "auto"
    if cast and "quantization_config" in json.loads((origin / "config.json").read_bytes()):
        raise StageFailed("config", f"dtype: found {stage.dtype}, but the model's weights are quantized", "remove it")
    for name in files_of(source):
        if not (cast and name.endswith((".safetensors", ".safetensors.index.json"))):
            copy(origin / name, folder / name)
    if origin != source.path:  # its own template
        for name, _ in sizes(source.path):
            if name != REFERENCE:
                copy(source.path / name, folder / name)
    if cast:
        from peft import LoraConfig

        weights = stored_tensors(origin)
        as_merge = MergeStage(kind="merge", adapters=(stage.of,), dtype=stage.dtype, max_shard_size=stage.max_shard_size)
        merge.merge_streamed(LoraConfig(), {}, weights, folder, as_merge, events)
        check_tensors(weights, stored_tensors(folder), 0)
    tokenizer = load_tokenizer(tokenizer_of or source)
    save_configs(folder, folder, stage.dtype if cast else None, tokenizer, events)
    check_ends(folder, tokenizer)


def files_of(source: Input) -> list[str]:
    reference = source.path / REFERENCE
    if reference.exists():
        return [entry["path"] for entry in json.loads(reference.read_bytes())["files"]]
    return [name for name, _ in sizes(source.path)]


def write_adapter(source: Input, hub: tuple[str, str] | None, stage: ExportStage, folder: Path, events: Events) -> Adapter:
    """Write an Adapter, with the name of its base. `hub`: repository and commit of the base, if it is from there. Return what it needs."""
    from peft import PeftConfig

    assert source.base is not None
    for name, _ in sizes(source.path):
        copy(source.path / name, folder / name)
    if stage.dtype != "auto":
        cast_adapter(folder / "adapter_model.safetensors", stage.dtype)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    name, commit = hub or (BASE, None)
    config |= {"base_model_name_or_path": name, "revision": commit}
    write_json(folder / "adapter_config.json", config)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # where the base's answers end, with the ends of trained answers
        configs = Path(scratch)
        if hub or stage.adapter_only:
            save_configs(model_folder(source.base.path), configs, None, load_tokenizer(source), events)
        else:
            configs = folder / BASE
            write_model(source.base, configs, stage.model_copy(update={"dtype": "auto"}), events, tokenizer_of=source)
        generation = configs / "generation_config.json"
        document = json.loads((configs / "config.json").read_bytes())
        ends = {"eos_token_id": document.get("eos_token_id")}
        write_json(folder / generation.name, json.loads(generation.read_bytes()) if generation.exists() else ends)
    needed = merge.tokens_of(PeftConfig.from_pretrained(folder))
    rows = document["vocab_size"] if "vocab_size" in document else document["text_config"]["vocab_size"]
    return Adapter(hub[0] if hub else None if stage.adapter_only else BASE, commit, needed if needed > rows else 0)


def cast_adapter(file: Path, dtype: str) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=metadata)
    file.chmod(mode)  # safetensors lets only the owner read what it writes


def copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as given, target.open("wb") as made:
        left = os.fstat(given.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(given.fileno(), made.fileno(), left)):
                left -= done
        except OSError:  # not between these file systems
            left = -1
    if left:
        shutil.copyfile(source, target)
