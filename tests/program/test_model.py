"""Program `model`: three sources, the check, and what it refuses. Needs the torch runtime."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere
from hub_tools import COMMIT, hub_layout
from older import Older, agree
from pico import save_pico, tokenizer
from program_tools import make_request, payload_digest, run_program

from tasks.models.hardware import computed_on
from tasks.models.loading import load_model, load_tokenizer, model_folder
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request, Result


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("pico") / "model", whole=True)


@pytest.fixture
def copy(pico: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico, tmp_path / "model"))


@dataclass
class Run:
    """A request carried out, and what it said."""

    request: Request
    result: Result
    events: list[dict[str, Any]]

    @property
    def payload(self) -> Path:
        return self.request.payload


def run_model(folder: Path, config: dict[str, Any], **fields: Any) -> Run:
    request = make_request(folder, {"kind": "model"} | config, {}, **fields)
    return Run(request, *run_program(request))


def run_path(folder: Path, model: Path) -> Run:
    return run_model(folder, {"path": "model"}, files={"path": [model]})


# --- path -------------------------------------------------------------------------------------------------------------


def test_path_is_kept_by_reference(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("not needed")
    run = run_path(tmp_path / "run", copy)
    assert [file.name for file in run.payload.iterdir()] == ["reference.json"]
    assert str(copy) not in (run.payload / "reference.json").read_text()
    document = json.loads((run.payload / "reference.json").read_text())
    names = [entry["path"] for entry in document["files"]]
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert "README.md" not in names
    assert model_folder(run.payload) == copy
    assert run.result.metrics["bytes"] == (copy / "model.safetensors").stat().st_size
    assert run.result.info["architecture"] == "LlamaForCausalLM"
    assert len(run.result.info["template"]) == 64
    assert "| parameters | 3," in (run.request.meta / "report.md").read_text()
    assert run.events[-1]["message"] == "checked"


def test_a_result_says_on_what_it_was_computed_and_how_much_memory_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    before = computed_on()
    assert set(before) == {"peak_memory"}
    held = bytearray(os.urandom(200 << 20))
    assert computed_on()["peak_memory"] >= len(held)
    facts = {"is_initialized": True, "get_device_name": "NVIDIA H200", "max_memory_allocated": 5 << 30}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = computed_on()
    assert {name: found[name] for name in found if name != "peak_memory"} == {
        "device": "NVIDIA H200", "devices": 8, "peak_device_memory": 5 << 30,
    }  # fmt: skip


def test_named_templates_are_part_of_the_model(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Command-R has them: in a folder of their own."""
    (copy / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (copy / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name}: {{{{ messages }}}}")
    (copy / "additional_chat_templates" / "notes.txt").write_text("not needed")
    (copy / "other").mkdir()
    run = run_path(tmp_path / "run", copy)
    names = [entry["path"] for entry in json.loads((run.payload / "reference.json").read_text())["files"]]
    assert [name for name in names if "/" in name] == ["additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"]
    assert "{#- tool_use #}\ntool_use: {{ messages }}" in (run.request.meta / "report.md").read_text()

    hub_layout(tmp_path / "cache", copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fetched = run_hub(tmp_path / "hub")
    assert sorted(path.relative_to(fetched.payload).as_posix() for path in fetched.payload.rglob("*") if path.is_file()) == sorted(names)
    templates = load_tokenizer(Input(path=fetched.payload, digest="", type="Model")).chat_template
    assert set(templates) == {"default", "tool_use", "rag"}
    assert fetched.result.info["template"] == run.result.info["template"]

    (copy / "additional_chat_templates" / "rag.jinja").write_text("other")
    with pytest.raises(StageFailed, match=r"rag.jinja has changed since"):
        model_folder(run.payload)


def test_a_changed_file_is_noticed_where_the_reference_is_used(copy: Path, tmp_path: Path) -> None:
    run = run_path(tmp_path / "run", copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    with pytest.raises(StageFailed, match=r"config.json has changed since"):
        model_folder(run.payload)


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for tied in (True, False):
        folder = save_pico(tmp_path / f"tied-{tied}", tied=tied, dtype="bfloat16")
        run = run_path(tmp_path / f"run-{tied}", folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert run.result.metrics["parameters"] == model.num_parameters()


# --- what is refused --------------------------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")


def sharded(folder: Path) -> None:
    """Two shards and their index, as save_pretrained writes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="12800KB")
    assert len(list(folder.glob("model-*.safetensors"))) == 2


def shard_missing(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_missing(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").unlink()


def index_wrong(folder: Path) -> None:
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    document["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))


def tensor_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))

    return apply


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def larger_vocabulary(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, r"has no model\.safetensors, found pytorch_model.bin"),
        (cut, r"model.safetensors: found \d+ bytes, expected \d+"),
        (not_safetensors, r"model.safetensors is no safetensors file, or is truncated"),
        (shard_missing, r"index.json names model-00002-of-00002.safetensors, found no such file"),
        (index_missing, r"found model-00001-of-00002.safetensors, model-00002-of-00002.safetensors without"),
        (index_wrong, r"2 tensors do not match .*: found model.ghost in no file, expected in model-00001"),
        (tensor_missing, r"lack model.layers.0.self_attn.q_proj.weight"),
        (edit("config.json", intermediate_size=99), r"does not load: .*size"),
        (edit("config.json", model_type="of-the-future"), r"config.json .* does not load: .*of-the-future"),
        (edit("tokenizer_config.json", eos_token=None), r"has no eos token"),
        (no_tokenizer, r"the tokenizer of .* "),
        (adapter, r"has no config.json"),
        (larger_vocabulary, r"has 49153 tokens, the model has embeddings for 49152"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_broken_model_is_refused(copy: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(StageFailed, match=message) as failure:
        run_path(tmp_path / "run", copy)
    assert failure.value.failure_class == "data"
    assert failure.value.hint


def test_shards_with_their_index_pass(copy: Path, tmp_path: Path) -> None:
    sharded(copy)
    assert "in 2 file(s)" in (run_path(tmp_path / "run", copy).request.meta / "report.md").read_text()


def test_warnings(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    edit("generation_config.json", eos_token_id=[0, 7])(copy)
    run = run_path(tmp_path / "run", copy)
    assert run.result.info["template"] is None
    first, second = (event["message"] for event in run.events if event["type"] == "warning")
    assert "no chat template" in first
    assert "ends at tokens [0, 7], the tokenizer's eos token '<|im_end|>' is 2" in second


# --- hub --------------------------------------------------------------------------------------------------------------


def run_hub(folder: Path) -> Run:
    return run_model(folder, {"hub": "tests/pico"}, commits={"hub": COMMIT})


def test_hub_from_the_cache_without_network(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "README.md").write_text("not needed")
    hub_layout(tmp_path / "cache", copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run = run_hub(tmp_path / "run")
    assert sorted(file.name for file in run.payload.rglob("*")) == sorted(file.name for file in copy.iterdir() if file.name != "README.md")
    assert not any(file.is_symlink() for file in run.payload.iterdir())
    assert run.result.info["source"] == f"tests/pico at commit {COMMIT}"
    assert load_tokenizer(Input(path=run.payload, digest="", type="Model")).eos_token == "<|im_end|>"


def test_hub_with_only_pickles_is_refused(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(copy)
    hub_layout(tmp_path / "cache", copy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StageFailed, match=r"tests/pico at commit 0123\w+ has no model\.safetensors") as failure:
        run_hub(tmp_path / "run")
    assert "safetensors" in failure.value.hint
    assert not list((tmp_path / "run" / "out" / "payload").glob("*.bin"))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: the tree of a commit, and its files."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == f"/api/models/tests/pico/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(content), "oid": sha1(content)} for name, content in self.files.items()]
            self.answer(json.dumps(tree).encode(), "application/json")
            return
        name = path.removeprefix(f"/tests/pico/resolve/{COMMIT}/")
        if self.command == "GET":
            self.asked.append(name)
        self.answer(self.files[name], "application/octet-stream")

    do_HEAD = do_GET

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "ETag": f'"{sha1(body)}"', "X-Repo-Commit": COMMIT}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def test_hub_download(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file.name: file.read_bytes() for file in pico.iterdir()}
    unwanted = {
        "README.md": b"#",
        "pytorch_model.bin": b"pickle",
        "modeling_pico.py": b"code",
        "model-0/1-of-2.safetensors": b"other",
        "model.fp16.safetensors": b"variant",
        "other/tokenizer.json": b"of another model",
    }
    handler = type("PicoHub", (Hub,), {"files": files | unwanted, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    try:
        run = run_hub(tmp_path / "run")
        assert {file.name: file.read_bytes() for file in run.payload.rglob("*")} == files
        assert sorted(handler.asked) == sorted([*files, "README.md"])  # it names the license
        # What is in the cache is not fetched again, and with no hub in reach it is enough.
        server.shutdown()
        assert payload_digest(run_hub(tmp_path / "again").request) == payload_digest(run.request)
    finally:
        server.shutdown()
        server.server_close()


# --- gguf -------------------------------------------------------------------------------------------------------------


def save_pico_gguf(file: Path) -> Any:
    """A pico Llama in GGUF, with the first tokens of SmolLM2's tokenizer. Returns the up projection of its first layer."""
    import numpy as np
    from gguf import GGUFWriter

    source = tokenizer(whole=True)
    model = json.loads(source.backend_tokenizer.to_str())["model"]
    vocabulary, width, heads, kv_heads, inner = 1000, 64, 4, 2, 128
    tokens = sorted(model["vocab"], key=model["vocab"].get)[:vocabulary]
    known = set(tokens)
    merges = [" ".join(pair) for pair in model["merges"] if "".join(pair) in known]
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in source.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(source.bos_token_id)
    writer.add_eos_token_id(source.eos_token_id)
    writer.add_unk_token_id(source.unk_token_id)
    writer.add_pad_token_id(source.pad_token_id)
    writer.add_chat_template(source.chat_template)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    random = np.random.default_rng(0)
    kv = width // heads * kv_heads
    shapes = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width)}
    shapes |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    tensors = {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()}
    values = {
        name: random.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in ({"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)} | tensors).items()
    }
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values["blk.0.ffn_up.weight"]


@pytest.mark.slow
def test_gguf_becomes_safetensors_and_is_deterministic(tmp_path: Path, elsewhere: Elsewhere, older: Older) -> None:
    import torch

    (tmp_path / "other").mkdir()
    written = save_pico_gguf(tmp_path / "pico.gguf")
    shutil.copyfile(tmp_path / "pico.gguf", tmp_path / "other" / "renamed.gguf")
    run = run_model(tmp_path / "a", {"gguf": "pico.gguf"}, files={"gguf": [tmp_path / "pico.gguf"]})
    assert {file.name for file in run.payload.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert str(tmp_path) not in "".join(file.read_text() for file in run.payload.glob("*.json"))

    source = Input(path=run.payload, digest="", type="Model")
    model = load_model(source, torch.float32)
    assert "quantization_config" not in model.config.to_dict()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.from_numpy(written))
    conversation = [{"role": "user", "content": "What is 2 + 2?"}]
    assert "<|im_start|>user\nWhat is 2 + 2?" in load_tokenizer(source).apply_chat_template(conversation, tokenize=False)
    agree(older, source)

    config = {"kind": "model", "gguf": "other/renamed.gguf"}
    request = make_request(tmp_path / "b", config, {}, files={"gguf": [tmp_path / "other" / "renamed.gguf"]})
    elsewhere.run(request)
    assert payload_digest(request) == payload_digest(run.request)
