"""Fetches a base model and checks it, so that no later stage finds out after an hour that it is broken.

    hub   downloads the commit that the orchestrator pinned, through the hub's own cache: an interrupted download resumes, and
          a model that is already on the machine is not downloaded again. Files are linked or copied into the payload.
    path  refers to the folder: the payload lists its files with size and sha256; nothing is copied.
    gguf  converts the file to safetensors in float32, with transformers.

Left out on purpose: pickled weights (reading them can run code), sub-folders except the one of named templates, and every file
that transformers does not need. Python files are kept only if `trust_remote_code` is set; without it, a model that needs them
is refused. The check reads the headers of weight files, never the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.chat_template import FOLDER, Template, save_template, set_template
from tasks.models.licenses import of_model
from tasks.models.loading import CODE, save_tokenizer, template_hash, write_json
from tasks.models.older_readers import readable_config
from tasks.models.weights import INDEX, PICKLES, WEIGHTS, Weights, read_weights, weight_files
from tuneline.errors import StageFailed
from tuneline.kinds.model import ModelStage
from tuneline.patches import patch
from tuneline.wording import markdown_table
from tuneline.workspace.file_names import REPORT_TEXT
from tuneline.workspace.protocol import Events, Request, Result
from tuneline.workspace.reference import REFERENCE, point

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FILES = (
    *(*WEIGHTS, INDEX, "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class Facts:
    """Holds what the check found."""

    architecture: str
    weights: Weights
    vocabulary: int
    context: int | None
    eos_token: str
    template: Template
    template_hash: str | None
    changed: bool
    """Whether the stage sets the template or its arguments."""


def run(request: Request, stage: ModelStage, events: Events) -> Result:
    if stage.hub is not None:
        commit = request.commits["hub"]
        source = f"{stage.hub} at commit {commit}"
        events.progress(0, 2, f"fetching {stage.hub}")
        folder = request.payload
        from_hub(stage.hub, commit, folder, stage.trust_remote_code)
    elif stage.gguf is not None:
        file = request.files["gguf"][0]
        source = f"GGUF file {file.name}"
        events.progress(0, 2, f"converting {file.name}")
        folder = request.payload
        from_gguf(file, folder)
    else:
        folder = request.files["path"][0]
        source = f"folder {folder.name}, by reference"
    events.progress(1, 2, "checking")
    facts = check(folder, source, request, stage, events)
    if stage.path is not None:
        write_reference(folder, request.payload, stage.trust_remote_code)
    if facts.changed:
        save_template(facts.template, request.payload)
    (request.meta / REPORT_TEXT).write_text(report(source, facts), encoding="utf-8")
    events.progress(2, 2, "checked")
    metrics = {"parameters": float(facts.weights.parameters), "bytes": float(facts.weights.bytes)}
    info = {"template": facts.template_hash, "architecture": facts.architecture, "source": source, "license": of_model(request, stage)}
    return Result(metrics=metrics, info=info)


# --- the three sources ------------------------------------------------------------------------------------------------


def from_hub(repository: str, commit: str, payload: Path, code: bool) -> None:
    from huggingface_hub import snapshot_download

    allowed, others = [*patterns(code), f"{FOLDER}/*.jinja"], ["*/*.safetensors", f"*/*{CODE}", "*/*/*"]
    snapshot = Path(snapshot_download(repository, revision=commit, allow_patterns=allowed, ignore_patterns=others))
    for file in kept_files(snapshot, code):
        target = payload / file.relative_to(snapshot)
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:  # the cache is on another file system
            shutil.copyfile(file, target)


def from_gguf(file: Path, payload: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
    except ValueError as error:
        hint = "use a complete file, of an architecture that transformers converts from GGUF"
        raise StageFailed("data", f"{file.name} does not load as GGUF: {first_line(error)}", hint) from error
    # The weights are float32 now, but with these attributes transformers would refuse to save them.
    patch(model, "hf_quantizer", None)
    del model.config.quantization_config
    model.save_pretrained(payload)
    config = json.loads((payload / "config.json").read_text(encoding="utf-8"))
    write_json(payload / "config.json", readable_config(config))
    save_tokenizer(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True), payload)


def write_reference(folder: Path, payload: Path, code: bool) -> None:
    """Write reference.json (what the model is) and location.json (where it is): see `tuneline.workspace.reference`."""
    entries = []
    for file in kept_files(folder, code):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        entries.append({"path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "sha256": digest})
    (payload / REFERENCE).write_text(json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    point(payload.parent, folder)


def kept_files(folder: Path, code: bool = False) -> list[Path]:
    files = (file for file in folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns(code)))
    return sorted([*files, *(folder / FOLDER).glob("*.jinja")])


def patterns(code: bool) -> list[str]:
    return [*FILES, f"*{CODE}"] if code else list(FILES)


# --- the check --------------------------------------------------------------------------------------------------------


def check(folder: Path, source: str, request: Request, stage: ModelStage, events: Events) -> Facts:
    """Check everything that would make a training fail. Raises StageFailed for the first problem."""
    code = stage.trust_remote_code
    if not (folder / "config.json").is_file():
        hint = "this is an adapter: name the model that it was trained on" if (folder / "adapter_config.json").is_file() else ""
        raise StageFailed("data", f"{source} has no config.json", hint or "a model folder holds config.json, weights and tokenizer")
    if not weight_files(folder):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        raise StageFailed(
            "data",
            f"{source} has no {WEIGHTS[0]}, found {', '.join(pickles) or 'no weight files of another format'}",
            "reading pickled weights can run code, so they are refused: save the model with safetensors, or use a revision that has them",
        )
    weights = read_weights(folder)
    check_code(folder, source, code)
    config, tokenizer = load_config(folder, source, code), load_check_tokenizer(folder, source, code)
    vocabulary = config.get_text_config().vocab_size
    if tokenizer.eos_token_id is None:
        hint = "without an eos token no answer ends: set eos_token in tokenizer_config.json"
        raise StageFailed("data", f"the tokenizer of {source} has no eos token", hint)
    if len(tokenizer) > vocabulary:
        raise StageFailed(
            "data",
            f"the tokenizer of {source} has {len(tokenizer)} tokens, the model has embeddings for {vocabulary}",
            "tokenizer and weights are of different models, or tokens were added without resizing the embedding",
        )
    check_names(folder, source, config, code)
    changed = set_template(tokenizer, stage, next(iter(request.files.get("chat_template", [])), None))
    for warning in warnings(folder, tokenizer):
        events.warning(warning)
    return Facts(
        architecture=(config.architectures or [config.model_type])[0],
        weights=weights,
        vocabulary=vocabulary,
        context=config.get_text_config().to_dict().get("max_position_embeddings"),
        eos_token=str(tokenizer.eos_token),
        template=tokenizer.chat_template,
        template_hash=template_hash(tokenizer),
        changed=changed,
    )


def text_of(template: Template) -> str:
    """Return the text of a template, or of all named templates."""
    if isinstance(template, dict):
        return "\n\n".join(f"{{#- {name} #}}\n{text}" for name, text in sorted(template.items()))
    return template or ""


def check_code(folder: Path, source: str, code: bool) -> None:
    """Raises StageFailed if `auto_map` names the model's own classes and they may not, or cannot, be run."""
    for name in ("config.json", "tokenizer_config.json"):
        for named in own_classes(folder / name):
            module = f"{named.split('.')[0]}{CODE}"
            if not code:
                hint = "if you trust its author, set `trust_remote_code: true` in the model's stage; else use a model without own code"
                raise StageFailed("config", f"{name} of {source} names its own Python code, {named}, which is not run", hint)
            if "--" in named:
                hint = "put the file beside config.json, and name it there without the repository"
                raise StageFailed("config", f"{name} of {source} names code of another repository, {named}", hint)
            if not (folder / module).is_file():
                raise StageFailed("data", f"{name} of {source} names {named}, but there is no {module}", "use the complete model")


def own_classes(file: Path) -> list[str]:
    """Return names such as `modeling_mine.MineForCausalLM`. A tokenizer may name a slow and a fast class, or null."""
    try:
        named = json.loads(file.read_bytes()).get("auto_map", {})
    except (OSError, ValueError):
        return []  # the code that loads the file reports the problem
    return [part for item in named.values() for part in (item if isinstance(item, list) else [item]) if part]


def load_config(folder: Path, source: str, code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except (ValueError, OSError, KeyError) as error:
        hint = "tuneline reads models that transformers supports, or that bring their code (see trust_remote_code)"
        raise StageFailed("data", f"config.json of {source} does not load: {first_line(error)}", hint) from error


def load_check_tokenizer(folder: Path, source: str, code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
    except Exception as error:  # the Rust side raises bare Exception for a broken tokenizer.json
        hint = "a model folder holds tokenizer.json (or tokenizer.model) and tokenizer_config.json"
        raise StageFailed("data", f"the tokenizer of {source} does not load: {first_line(error)}", hint) from error
    if len(tokenizer) == 0:
        raise StageFailed("data", f"the tokenizer of {source} is empty", "a model folder holds tokenizer.json or tokenizer.model")
    return tokenizer


def check_names(folder: Path, source: str, config: PreTrainedConfig, code: bool) -> None:
    """Compare names and shapes on the meta device, without weights: transformers would fill missing weights with random numbers.

    Skips quantized models: their libraries do not load onto the meta device.
    """
    from transformers import AutoModelForCausalLM

    if "quantization_config" in config.to_dict():
        return
    try:
        _, loaded = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, local_files_only=True, trust_remote_code=code, use_safetensors=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        hint = "weights and config.json must be of the same causal language model"
        raise StageFailed("data", f"{source} does not load: {first_line(error)}", hint) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise StageFailed("data", f"the weights of {source} lack {named}", "use the complete model: missing weights would be random")


def warnings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    if tokenizer.chat_template is None:
        found.append("the model has no chat template: it can learn from plain text and prompt/completion rows, not from conversations")
    generation = folder / "generation_config.json"
    ends: Any = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    ends = ends if isinstance(ends, list) else [ends]
    if ends != [None] and tokenizer.eos_token_id not in ends:
        eos = f"{tokenizer.eos_token!r} is {tokenizer.eos_token_id}"
        found.append(f"generation_config.json ends at tokens {ends}, the tokenizer's eos token {eos}")
    return found


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def report(source: str, facts: Facts) -> str:
    rows = {
        "source": source,
        "architecture": facts.architecture,
        "parameters": f"{facts.weights.parameters:,}",
        "weights": f"{facts.weights.bytes:,} bytes in {facts.weights.files} file(s), {facts.weights.types}",
        "vocabulary": f"{facts.vocabulary:,}",
        "context": f"{facts.context:,} tokens" if facts.context else "not given",
        "eos token": f"`{facts.eos_token}`",
        "chat template": f"sha256 {facts.template_hash}" if facts.template_hash else "none",
    }
    template = f"\n## Chat template\n\n```jinja\n{text_of(facts.template)}\n```\n" if facts.template else ""
    return f"# Model\n\n{markdown_table(('', ''), rows.items())}\n{template}"
