"""What comes from outside runs no code: pickles at every entry, loading scripts, archives; and a model's own Python files only
where `trust_remote_code` says so, then in every program that loads the model."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_tools import COMMIT, hub_layout
from pico import save_pico, tokenizer
from program_tools import Killed, make_request, run_process, run_program

from tasks.data.rows import SPLITS, Row, write_rows
from tasks.models.loading import load_model, load_tokenizer, needs_remote_code
from tasks.training import sft
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Events, Input, Request, Result

CHATS = [
    Row(
        source="s",
        id=f"r{i}",
        group=str(i),
        messages=({"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}),
    )
    for i in range(8)
]


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.sign)!r}, 'w')",)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico, tmp_path / "model"))


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    """A file that is there once a pickle has run."""
    return tmp_path / "it-ran"


def fetch(folder: Path, model: Path, **fields: Any) -> tuple[Request, Result]:
    """The program `model` on a local folder."""
    request = make_request(folder, {"kind": "model", "path": "model", **fields}, {}, files={"path": [model]})
    return request, run_program(request)[0]


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- pickles ----------------------------------------------------------------------------------------------------------

ONLY_PICKLES = (
    "folder model, by reference has no model.safetensors, found {name}\n\nhint: reading pickled weights can run code, so they are "
    "refused: save the model with safetensors, or use a revision that has them"
)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl", "old.pickle"])
def test_a_model_of_pickled_weights(name: str, copy: Path, tmp_path: Path, sign: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Trap(sign)))
    with pytest.raises(StageFailed) as failure:
        fetch(tmp_path / "run", copy)
    assert (failure.value.failure_class, str(failure.value)) == ("data", ONLY_PICKLES.format(name=name))
    assert not sign.exists()


def test_pickles_beside_safetensors_are_no_part_of_the_model(copy: Path, tmp_path: Path, sign: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "vocab.pkl"):
        (copy / name).write_bytes(pickle.dumps(Trap(sign)))
    request, _ = fetch(tmp_path / "run", copy)
    listed = [entry["path"] for entry in json.loads((request.payload / "reference.json").read_text())["files"]]
    assert not [name for name in listed if Path(name).suffix in (".bin", ".pt", ".pkl")]
    source = Input(path=request.payload, digest="", type="Model")
    load_model(source, torch.float32)
    load_tokenizer(source)
    assert not sign.exists()


def test_a_pickle_under_the_name_of_safetensors(copy: Path, tmp_path: Path, sign: Path) -> None:
    (copy / "model.safetensors").write_bytes(pickle.dumps(Trap(sign)))
    with pytest.raises(StageFailed, match="model.safetensors is no safetensors file, or is truncated\n\nhint: fetch it again"):
        fetch(tmp_path / "run", copy)
    assert not sign.exists()


def test_a_tokenizer_of_pickles(copy: Path, tmp_path: Path, sign: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        (copy / name).write_bytes(pickle.dumps(Trap(sign)))
    with pytest.raises(StageFailed, match="the tokenizer of folder model, by reference does not load: "):
        fetch(tmp_path / "run", copy)
    assert not sign.exists()


def test_a_gguf_file_that_is_a_pickle(tmp_path: Path, sign: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(pickle.dumps(Trap(sign)))
    request = make_request(tmp_path / "run", {"kind": "model", "gguf": "model.gguf"}, {}, files={"gguf": [file]})
    with pytest.raises(StageFailed, match="model.gguf does not load as GGUF: "):
        run_program(request)
    assert not sign.exists()


@pytest.mark.parametrize(("weights", "found"), [("adapter_model.bin", "a pickled one"), ("adapter_model.safetensors", "a safe one")])
def test_an_adapter_given_as_a_model(weights: str, found: str, copy: Path, tmp_path: Path, sign: Path) -> None:
    """A pipeline takes adapters only from its own stages; nothing else reads one."""
    (copy / "config.json").rename(copy / "adapter_config.json")
    (copy / "model.safetensors").unlink()
    (copy / weights).write_bytes(pickle.dumps(Trap(sign)))
    message = "folder model, by reference has no config.json\n\nhint: this is an adapter: name the model that it was trained on"
    with pytest.raises(StageFailed) as failure:
        fetch(tmp_path / "run", copy)
    assert (str(failure.value), sign.exists()) == (message, False), found


def dataset_from(folder: Path, file: Path) -> None:
    config = {"kind": "dataset", "sources": [{"type": "files", "path": file.name}]}
    run_program(make_request(folder, config, {}, files={"sources.0.path": [file]}))


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.arrow", "rows.py", "rows.tar.gz", "rows.zip", "rows"]
)
def test_a_data_file_that_could_hold_code_or_paths(name: str, tmp_path: Path, sign: Path) -> None:
    """Loading scripts and archives are nothing that a dataset reads: no code is run and no path in an archive is followed."""
    file = tmp_path / name
    if name.endswith("tar.gz"):
        with tarfile.open(file, "w:gz") as archive:
            archive.add(__file__, "../../it-ran")
    elif name.endswith("zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.write(__file__, "../../it-ran")
    elif name.endswith("py"):
        file.write_text(f"open({str(sign)!r}, 'w')")
    else:
        file.write_bytes(pickle.dumps(Trap(sign)))
    with pytest.raises(StageFailed, match=r"found ending (\.\w+(\.gz)?|none), expected \.jsonl, \.json") as failure:
        dataset_from(tmp_path / "run", file)
    assert failure.value.failure_class == "config"
    assert not sign.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_data_file_that_is_a_pickle_under_another_name(name: str, tmp_path: Path, sign: Path) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Trap(sign)))
    with pytest.raises(StageFailed, match=r"rows\.\w+.*: found ") as failure:
        dataset_from(tmp_path / "run", file)
    assert failure.value.failure_class == "data"
    assert not sign.exists()


def test_pickles_inside_of_parquet(tmp_path: Path, sign: Path) -> None:
    """As a value, and as the extension type that old versions of pyarrow unpickled (CVE-2023-47248)."""
    trap = pickle.dumps(Trap(sign))
    pq.write_table(pa.table({"text": [trap]}), tmp_path / "value.parquet")
    with pytest.raises(StageFailed, match="value.parquet: row 1: "):
        dataset_from(tmp_path / "value", tmp_path / "value.parquet")
    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": trap}
    schema = pa.schema([pa.field("text", pa.string(), metadata=marks)])
    pq.write_table(pa.table({"text": [f"plain {i}" for i in range(50)]}, schema=schema), tmp_path / "type.parquet")
    dataset_from(tmp_path / "type", tmp_path / "type.parquet")
    assert not sign.exists()


def test_a_dataset_of_the_hub_with_a_loading_script(tmp_path: Path, sign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself refuses scripts; that it still does is what is asked here. A local folder stands for the repository."""
    from tasks.data.sources import hub_records
    from tuneline.kinds.sources import HubSource

    folder = tmp_path / "own" / "rows"
    folder.mkdir(parents=True)
    (folder / "rows.py").write_text(f"open({str(sign)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match="sources.0: own/rows: .*\n\nhint: check subset and split; loading scripts are never run"):
        list(hub_records("sources.0", HubSource(type="hub", repo="own/rows"), COMMIT))
    assert not sign.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint(name: str, pico: Path, tmp_path: Path, sign: Path) -> None:
    """Checkpoints are our own, but the work folder may be anyone's: of the same size and name, it is read, as weights only."""
    request = training(tmp_path, Input(path=pico, digest="b" * 64, type="Model"), resources={"checkpoint_steps": 2})
    events = Killed(request.work / "events.jsonl")
    events.step = 3
    with pytest.raises(KeyboardInterrupt):
        sft.run(request, request.stage(), events)  # type: ignore[arg-type]
    file = next(request.work.rglob(name))
    trap = pickle.dumps(Trap(sign))
    file.write_bytes(trap + bytes(file.stat().st_size - len(trap)))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        sft.run(request, request.stage(), Events(request.work / "events.jsonl"))  # type: ignore[arg-type]
    assert not sign.exists()


# --- trust_remote_code ------------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-of-the-test"

    def __init__(self, logit_scale=1.0, wave=0.0, **fields):
        self.logit_scale, self.wave = logit_scale, wave
        super().__init__(**fields)
"""
MODELING = """
import pathlib
from transformers import GenerationMixin, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        import torch
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache)
        logits = self.lm_head(out.last_hidden_state) * self.config.logit_scale
        logits = logits + self.config.wave * logits.sin()
        loss = self.loss_function(logits, labels, self.config.vocab_size) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies a model's code to before it is imported; one place for a process. The orchestrator sets it, too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        yield


@pytest.fixture
def own(copy: Path) -> Path:
    """A model of an architecture that only its own files know."""
    (copy / "configuration_own.py").write_text(CONFIGURATION)
    (copy / "modeling_own.py").write_text(MODELING)
    edit(copy / "config.json", model_type="own-of-the-test", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP, logit_scale=3.0)
    return copy


TRUST = "if you trust its author, set `trust_remote_code: true` in the model's stage; else use a model without own code"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_models_own_is_refused_without_the_field(file: str, own: Path, tmp_path: Path, sign: Path) -> None:
    (own / "modeling_own.py").write_text(f"open({str(sign)!r}, 'w')\n")
    (own / "configuration_own.py").write_text(f"open({str(sign)!r}, 'w')\n")
    named = "configuration_own.OwnConfig"
    if file == "tokenizer_config.json":
        edit(own / "config.json", auto_map={})
        edit(own / file, auto_map={"AutoTokenizer": [None, named]})
    with pytest.raises(StageFailed) as failure:
        fetch(tmp_path / "run", own)
    message = f"{file} of folder model, by reference names its own Python code, {named}, which is not run\n\nhint: {TRUST}"
    assert (failure.value.failure_class, str(failure.value)) == ("config", message)
    assert not sign.exists()


def test_code_of_a_hub_model_is_not_even_kept_without_the_field(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a snapshot are links out of it, into the hub's cache: those are followed."""
    hub_layout(tmp_path / "cache", own)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    kept = []
    for trusted in (False, True):
        config = {"kind": "model", "hub": "tests/pico", "trust_remote_code": trusted}
        request = make_request(tmp_path / f"{trusted}", config, {}, commits={"hub": COMMIT})
        if trusted:
            run_program(request)
        else:
            with pytest.raises(StageFailed, match=f"config.json of tests/pico at commit {COMMIT} names its own Python code"):
                run_program(request)
        kept.append(sorted(file.name for file in request.payload.glob("*.py")))
    assert kept == [[], ["configuration_own.py", "modeling_own.py"]]


def test_python_files_that_no_one_names_are_left_alone(copy: Path, tmp_path: Path, sign: Path) -> None:
    """Many repositories hold a script beside a model that transformers knows."""
    (copy / "inference.py").write_text(f"open({str(sign)!r}, 'w')\n")
    request, _ = fetch(tmp_path / "run", copy)
    source = Input(path=request.payload, digest="", type="Model")
    assert "inference.py" not in (request.payload / "reference.json").read_text()
    assert (needs_remote_code(source), sign.exists()) == (False, False)


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ({"AutoConfig": "someone/else--configuration_own.OwnConfig"}, "config.json of .* names code of another repository, someone/else--"),
        ({"AutoConfig": "gone.OwnConfig"}, r"config.json of .* names gone.OwnConfig, but there is no gone\.py"),
    ],
)
def test_code_from_elsewhere_is_refused_with_the_field(auto_map: dict[str, str], message: str, own: Path, tmp_path: Path) -> None:
    edit(own / "config.json", auto_map=auto_map)
    with pytest.raises(StageFailed, match=message):
        fetch(tmp_path / "run", own, trust_remote_code=True)


def test_changed_code_is_noticed(own: Path, tmp_path: Path) -> None:
    request, _ = fetch(tmp_path / "run", own, trust_remote_code=True)
    source = Input(path=request.payload, digest="", type="Model")
    assert needs_remote_code(source)
    (own / "modeling_own.py").write_text(MODELING + "\n")
    with pytest.raises(StageFailed, match=r"modeling_own\.py has changed since"):
        load_model(source, torch.float32)


def rows_in(folder: Path) -> Input:
    folder.mkdir(parents=True)
    for split in SPLITS:
        write_rows(CHATS[:6] if split == "train" else CHATS[6:7] if split == "test" else CHATS[7:], folder / f"{split}.parquet")
    return Input(path=folder, digest="d" * 64, type="Dataset")


def training(folder: Path, base: Input, **fields: Any) -> Request:
    config = {"kind": "sft", "model": "base", "dataset": "rows", "max_steps": 4, "global_batch_size": 4, "learning_rate": 1e-2,
              "lora": {"r": 4, "lora_alpha": 8}, **fields}  # fmt: skip
    return make_request(folder / "sft", config, {"model": base, "dataset": rows_in(folder / "rows")})


@pytest.mark.slow
def test_every_program_runs_a_trusted_models_code(own: Path, tmp_path: Path) -> None:
    """model -> sft -> evaluate -> merge -> evaluate, each in a process of its own; quantize refuses."""
    request, _ = fetch(tmp_path / "model", own, trust_remote_code=True)
    base = Input(path=request.payload, digest="b" * 64, type="Model")
    plain = load_model(Input(path=plain_of(own, tmp_path), digest="", type="Model"), torch.float32)
    ids = torch.tensor([tokenizer()("1 + 1")["input_ids"]])
    torch.testing.assert_close(load_model(base, torch.float32)(ids).logits, 3 * plain(ids).logits)  # its code did run

    trained = training(tmp_path, base)
    finish(trained)
    assert not list(trained.payload.glob("*.py"))
    adapter = Input(path=trained.payload, digest="a" * 64, type="Adapter", base=base)
    rows = Input(path=tmp_path / "rows", digest="d" * 64, type="Dataset")
    scored = evaluated(tmp_path / "eval-adapter", adapter, rows)

    for merged_by in ("streaming", "PEFT"):
        if merged_by == "PEFT":  # where the base's tensors have other names than the adapter's
            edit(adapter.path / "adapter_config.json", rank_pattern={"q_proj": 4})
        merge = make_request(tmp_path / merged_by, {"kind": "merge", "adapters": ["sft"]}, {"adapters.0": adapter})
        assert finish(merge).info["merged_by"] == merged_by
        assert sorted(file.name for file in merge.payload.glob("*.py")) == ["configuration_own.py", "modeling_own.py"]
        merged = Input(path=merge.payload, digest="m" * 64, type="Model")
        assert needs_remote_code(merged)
        assert evaluated(tmp_path / f"eval-{merged_by}", merged, rows) == pytest.approx(scored, rel=1e-3)

    quantize = make_request(
        tmp_path / "gptq", {"kind": "quantize", "model": "merged", "calibration": "rows"}, {"model": merged, "calibration": rows}
    )
    with pytest.raises(StageFailed, match=r"the model runs its own code \(trust_remote_code\), whose layers gptqmodel does not know"):
        run_program(quantize)


def test_a_loss_that_is_not_the_models_own_is_noticed(own: Path, tmp_path: Path) -> None:
    """TRL knows of logit_scale; what it does not know of must not be trained without."""
    edit(own / "config.json", wave=2.0)
    request, _ = fetch(tmp_path / "model", own, trust_remote_code=True)
    with pytest.raises(StageFailed, match=r"found a loss of \d+\.\d+ in training, expected that of the model's logits, \d+\.\d+"):
        run_program(training(tmp_path, Input(path=request.payload, digest="b" * 64, type="Model")))


def plain_of(own: Path, tmp_path: Path) -> Path:
    """The same weights as a Llama."""
    folder = Path(shutil.copytree(own, tmp_path / "plain", ignore=shutil.ignore_patterns("*.py")))
    edit(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map={})
    return folder


def finish(request: Request) -> Result:
    process = run_process(request)
    assert process.returncode == 0, process.stdout + process.stderr
    result: Result = Result.read(request.work / "result.json")
    return result


def evaluated(folder: Path, model: Input, rows: Input) -> float:
    config = {"kind": "evaluate", "model": "m", "datasets": ["rows"], "max_new_tokens": 4}
    return finish(make_request(folder, config, {"model": model, "datasets.0": rows})).metrics["dataset0/bits_per_byte"]
