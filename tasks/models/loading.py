"""Loads models and tokenizers out of artifacts, the same way in every program: local files only, safetensors only, and a model's
own code only if the user allowed it (`needs_remote_code`)."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.models.chat_template import fix_clock, saved_template
from tasks.models.gptq import is_gptq, load_dense
from tasks.models.older_readers import make_tokenizer_readable, readable_config
from tuneline.errors import StageFailed
from tuneline.files import sha256
from tuneline.kinds.stage import ComputingStage
from tuneline.workspace.artifact import digest
from tuneline.workspace.file_names import MANIFEST
from tuneline.workspace.protocol import Input, Request
from tuneline.workspace.reference import REFERENCE
from tuneline.workspace.reference import folder_of as model_folder
from tuneline.workspace.store import CHANGED, Store

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


CODE = ".py"
CPU_INFO = Path("/proc/cpuinfo")
CPUS_WITH_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and ARM
LEAST_CAPABILITY = (8, 0)  # of GPUs with bfloat16
REBUILD = "run `tuneline verify`, which moves damaged artifacts away, and run again: they are rebuilt"


def check_inputs(request: Request) -> None:
    """Raises StageFailed(data) if an input has changed since its manifest was written.

    Names and sizes are always compared. A file's content is read only if its ctime is later than the manifest's, which is written
    last, so unchanged files cost nothing. `tuneline verify` finds silent disk errors. A folder without a manifest is no
    artifact of a store: only tests and benchmarks have them.
    """
    for slot, source in request.inputs.items():
        for name, given in ((slot, source), (f"{slot}'s base", source.base)):
            if given is not None and (given.path.parent / MANIFEST).exists() and (problem := _problem(given)):
                raise StageFailed("data", f"{name}: {given.path}: {problem}", REBUILD)


def _problem(given: Input) -> str | None:
    folder = given.path.parent
    problem, artifact = Store(folder).inspect(folder)
    if artifact is None:
        return problem
    manifest, written = artifact.manifest, (folder / MANIFEST).stat().st_mtime_ns
    if manifest.digest != given.digest:
        return f"found the artifact with digest {manifest.digest[:12]}, expected {given.digest[:12]}"
    if digest(manifest.files) != manifest.digest or manifest.template != given.template:
        return "its manifest.json has been edited"
    for file in manifest.files:
        path = given.path / file.path
        if path.stat().st_ctime_ns > written and sha256(path) != file.sha256:
            return f"{file.path} {CHANGED}"
    return None


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_type(stage: ComputingStage) -> torch.dtype:
    """Return the dtype, which is part of the key. A request has it resolved: `auto` raises KeyError."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[stage.dtype]


def check_device(stage: ComputingStage) -> None:
    """Raises StageFailed(config) if the stage's GPUs are not visible, the runtime lacks its kernels, or bfloat16 would be emulated.

    Torch initializes CUDA here and cannot see other GPUs afterwards.
    """
    import torch

    if stage.resources.gpus and not torch.cuda.is_available():
        found = f"resources.gpus is {stage.resources.gpus}, but torch {torch.__version__} sees no GPU"
        raise StageFailed(
            "config", found, "check the driver, and that the runtime is one for GPUs; `gpus: 0` runs on the CPU, under another key"
        )
    if stage.resources.kernels == "liger" and find_spec("liger_kernel") is None:
        hint = "add liger-kernel to a lock of your own, under `runtimes:`, or remove `kernels`"
        raise StageFailed("config", "resources.kernels: found liger, which this runtime lacks", hint)
    if stage.dtype != "bfloat16":
        return
    if stage.resources.gpus:
        for number in range(torch.cuda.device_count()):
            if (capability := torch.cuda.get_device_capability(number)) < LEAST_CAPABILITY:
                found = f"{torch.cuda.get_device_name(number)} (compute capability {'.'.join(map(str, capability))}) has no bfloat16"
                raise StageFailed("config", found, "set `dtype: float32` in the stage, or use a GPU of compute capability 8.0 or more")
    elif not set(CPU_INFO.read_text().split()) & CPUS_WITH_BFLOAT16:
        found = "dtype is bfloat16, which this CPU only emulates, up to 100 times slower than float32"
        raise StageFailed("config", found, "set `dtype: float32` in the stage, or use a GPU, or a CPU with AVX512-BF16 or AMX")


def needs_remote_code(source: Input) -> bool:
    """Return whether Python files that came with a model are run: only if they are part of the artifact, which they are only if
    the stage that fetched the model set `trust_remote_code`. For an Adapter, the base decides."""
    model = source.base if source.base is not None else source
    reference = model.path / REFERENCE
    listed = [entry["path"] for entry in json.loads(reference.read_bytes())["files"]] if reference.exists() else []
    return any(name.endswith(CODE) for name in listed or [file.name for file in model.path.iterdir()])


def code_files(source: Input) -> list[Path]:
    """Return the Python files that every copy of this model needs."""
    return sorted(model_folder(source.path).glob(f"*{CODE}")) if needs_remote_code(source) else []


def load_tokenizer(source: Input) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a Model or an Adapter (the trained side's), with a padding token.

    Raises StageFailed(data) if its chat template is not the recorded one.
    """
    from transformers import AutoTokenizer

    folder = model_folder(source.path) if source.type == "Model" else source.path
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=needs_remote_code(source))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_no_end(tokenizer)
    if folder != source.path and (own := saved_template(source.path)) is not None:  # of a model that is kept by reference
        tokenizer.chat_template = own
    read = template_hash(tokenizer)
    fix_clock(tokenizer)
    if source.template is not None and source.template not in (read, template_hash(tokenizer)):
        raise StageFailed(
            "data",
            f"the chat template beside the {source.type.lower()} is not the one recorded when it was made "
            f"(sha256 {str(read)[:12]}, recorded {source.template[:12]})",
            REBUILD,
        )
    return tokenizer


def add_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop tokenizers from adding an eos token after any text: after a prompt, the model would take it as answered.
    `tasks.data.masks` adds the eos token where one belongs."""
    if not tokenizer.is_fast or tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        return
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.backend_tokenizer.to_str())
    for step in document["post_processor"].get("processors", [document["post_processor"]]):
        for pieces in (step.get("single"), step.get("pair")):
            while pieces and pieces[-1].get("SpecialToken", {}).get("id") == tokenizer.eos_token:
                pieces.pop()
    tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(document)).post_processor


def load_model(
    source: Input, dtype: torch.dtype, place: str | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Load a Model, or an Adapter on its base as a PeftModel, in evaluation mode on `place`, by default the first device;
    `balanced` spreads the layers over all devices.

    Decodes a GPTQ model (see `tasks.models.gptq`), unless it brings its own code. Makes this process multiply matrices on CPUs as
    fast as it can (`tasks.models.products`).
    """
    from transformers import AutoModelForCausalLM

    from tasks.models.products import use_fastest

    use_fastest()
    base = source.base if source.type == "Adapter" else source
    assert base is not None
    folder = model_folder(base.path)
    code = needs_remote_code(base)
    if is_gptq(folder) and not code:
        model = load_dense(folder, dtype, place if place == "balanced" else None)
    else:
        device_map: Any = place if place == "balanced" else {"": place or device()} if is_gptq(folder) or quantization else None
        options = {"quantization_config": quantization} if quantization else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, local_files_only=True, trust_remote_code=code, use_safetensors=True, **options
        )
    if source.type == "Adapter":
        from peft import PeftModel

        fit_vocabulary(model, source.path)
        model = PeftModel.from_pretrained(model, source.path)
        check_loaded(model, source.path)
    return (model if place == "balanced" else model.to(place or device())).eval()


def fit_vocabulary(model: PreTrainedModel, adapter: Path) -> None:
    """Enlarge the model's vocabulary for the tokens that an adapter adds; the adapter holds their weights."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    added = [number for numbers in (config.get("trainable_token_indices") or {}).values() for number in numbers]
    if added and max(added) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(added) + 1, mean_resizing=False)


def without_weights(folder: Path) -> PreTrainedModel:
    """Build a model on the meta device, from its configuration; a GPTQ model with the layers that it had before."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if is_gptq(folder):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_loaded(model: PeftModel, adapter: Path) -> None:
    """Raises StageFailed(bug) unless each tensor was read: PEFT skips those that do not fit, and keeps initial values for missing ones."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    there = get_peft_model_state_dict(model, save_embedding_layers=False)
    given = load_file(adapter / "adapter_model.safetensors")
    if wrong := sorted((given.keys() - there.keys() - set(model.state_dict())) | (there.keys() - given.keys())):
        raise StageFailed("bug", f"{len(wrong)} tensors of the adapter do not fit the base, first {wrong[0]}")
    shared = sorted(given.keys() & there.keys())
    if wrong := [name for name in shared if not torch.equal(there[name].cpu().float(), given[name].float())]:
        raise StageFailed("bug", f"{len(wrong)} tensors of the adapter were not read into the model, first {wrong[0]}")


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the sha256 of the chat template, or of all named templates; it is recorded in every manifest."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # which the file system lists in any order
        template = dict(sorted(template.items()))
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, payload: Path) -> None:
    """Save tokenizer and chat_template.jinja into an artifact's payload."""
    tokenizer.save_pretrained(payload)
    make_tokenizer_readable(payload)


def saved_tokenizer(trained: PreTrainedTokenizerBase, saved: Input) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an artifact that was just written. Raises StageFailed(bug) unless it equals the trained one."""
    if not any(saved.path.glob("tokenizer*")):
        raise StageFailed("bug", f"the {saved.type.lower()} was saved without its tokenizer")
    tokenizer = load_tokenizer(saved.model_copy(update={"template": template_hash(trained)}))
    if template_hash(tokenizer) != template_hash(trained) or tokenizer.get_vocab() != trained.get_vocab():
        raise StageFailed("bug", f"the {saved.type.lower()} was saved with another tokenizer than it was trained with")
    return tokenizer


def saved_config(document: dict[str, Any], dtype: str | None, **added: Any) -> dict[str, Any]:
    """Return config.json for a model derived from this base."""
    document = {name: value for name, value in document.items() if name != "_name_or_path"}
    if dtype:
        document |= {"dtype": dtype, "torch_dtype": dtype}  # its name before transformers 5
    return readable_config(document | added)


def write_json(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
