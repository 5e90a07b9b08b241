"""The program `export`: folders that others load, their model card, and a push to a hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import ENVIRONMENT, LocalHub, local_hub
from huggingface_hub import ModelCard, snapshot_download
from older import Older, agree
from program_tools import make_request, payload_digest, run_program
from safetensors.torch import load_file
from silent_tools import World

from tasks.convert.card import settings_table
from tasks.models.licenses import of_card
from tasks.models.loading import load_model
from tuneline.errors import StageFailed
from tuneline.kinds.sft import OTHER_ADAPTERS
from tuneline.workspace.artifact import Base, Manifest
from tuneline.workspace.cards import SECTIONS, TO_BE_WRITTEN, author_text, is_export
from tuneline.workspace.protocol import Input, Request

COMMIT = "0123456789" * 4
LIBRARIES = {"torch": "2.13.0"}
SCORES = {"dataset0/exact_match": 0.75, "dataset0/exact_match_stderr": 0.15, "arc_easy/acc": 0.5}


def describe(world: World, kind: str, **changed: Any) -> str:
    """Writes into a manifest what a run would; returns the artifact's name."""
    artifact = world.artifacts[kind]
    document = {"config": changed.pop("config", {}), "inputs": {}, "files": {}, "commits": {}, "libraries": LIBRARIES, "program": 1}
    document |= changed.pop("document", {})
    manifest = artifact.manifest.model_copy(update={"document": document, **changed})
    (artifact.path / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    world.artifacts[kind] = type(artifact)(artifact.path, Manifest.model_validate_json((artifact.path / "manifest.json").read_bytes()))
    return f"{kind}/{artifact.key}"


def described(world: World, folder: Path, hub: str | None = None) -> tuple[World, dict[str, str]]:
    """The world with manifests that say how it was made, an evaluation, and the names of its stages. `hub`: where its base is from."""
    copied = world.copy(folder)
    config = {"hub": hub} if hub else {}
    base = describe(
        copied,
        "model",
        config=config,
        document={"commits": {"hub": COMMIT} if hub else {}},
        info={"source": "a test", "license": {"license": "mit"}},
    )
    sources = [{"type": "files"}, {"type": "hub", "repo": "owner/rows"}]
    data = describe(
        copied, "dataset", config={"sources": sources}, document={"commits": {"sources.1.repo": COMMIT}}, parents={"model": base}
    )
    adapter = copied.artifacts["model"].manifest
    of_adapter = Base(kind="model", key=adapter.key, digest=adapter.digest, template=adapter.template)
    sft = describe(copied, "sft", config={"lora": {"r": 4}}, parents={"model": base, "dataset": data}, base=of_adapter)
    merged = describe(copied, "merge", parents={"adapters.0": sft})
    built = folder / "report"
    (built / "payload").mkdir(parents=True)
    (built / "payload" / "results.json").write_text("{}")

    def manifest(payload_digest: str, files: Any) -> Manifest:
        return Manifest.model_validate(
            {
                "kind": "evaluate", "type": "Report", "key": payload_digest, "document": {"config": {}}, "digest": payload_digest,
                "files": files, "parents": {"model": sft, "datasets.0": data}, "metrics": SCORES, "info": {"rows": {"dataset0": 12}}, "host": {},
            }
        )  # fmt: skip

    copied.artifacts["evaluate"] = copied.store.publish(built, manifest)
    report = f"evaluate/{copied.artifacts['evaluate'].key}"
    return copied, {base: "base", data: "data", sft: "sft", merged: "merged", report: "scored"}


def request_for(world: World, names: dict[str, str], folder: Path, **fields: Any) -> Request:
    kind = {"sft": "sft", "merged": "merge", "base": "model"}[fields.setdefault("of", "sft")]
    report = world.artifacts["evaluate"]
    inputs = {"of": world.input(kind), "evaluations.0": Input(path=report.payload, digest=report.digest, type="Report")}
    return make_request(folder, {"kind": "export", "evaluations": ["scored"], **fields}, inputs, history=names)


@pytest.fixture(scope="module")
def here(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, dict[str, str]]:
    return described(world, tmp_path_factory.mktemp("described") / "store")


def test_an_adapter_with_its_base(here: tuple[World, dict[str, str]], older: Older, tmp_path: Path) -> None:
    requests = [request_for(*here, tmp_path / name) for name in ("one", "two")]
    for request in requests:
        result, _ = run_program(request)
    assert payload_digest(requests[0]) == payload_digest(requests[1])
    folder = requests[0].payload
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", None)
    assert not any(b"tuneline:" in file.read_bytes() for file in folder.rglob("*.json"))
    assert not [file for file in folder.rglob("*") if file.is_symlink() or (file.stat().st_nlink > 1 and file.is_file())]
    base = Input(path=folder / "base", digest="", type="Model")
    agree(older, Input(path=folder, digest="", type="Adapter", base=base))
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((folder / "base" / "generation_config.json").read_text())["eos_token_id"]
    assert result.metrics["files"] == len([file for file in folder.rglob("*") if file.is_file()])


def test_the_card_says_what_the_manifests_say(here: tuple[World, dict[str, str]], tmp_path: Path) -> None:
    request = request_for(*here, tmp_path, license="apache-2.0", adapter_only=True)
    run_program(request)
    assert not (request.payload / "base").exists()
    card = ModelCard.load(request.payload / "README.md")
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("apache-2.0", "peft", ["owner/rows"])
    results = {result.metric_type: result for result in card.data.eval_results}
    assert (results["exact_match"].dataset_name, results["exact_match"].metric_value) == ("data", 0.75)
    assert results["exact_match"].metric_args == {"confidence_interval_95": [0.456, 1.0], "rows": 12}
    assert (results["acc"].dataset_name, results["acc"].metric_args) == ("arc_easy", None)
    train = here[0].artifacts["dataset"].manifest.metrics["rows_train"]
    for text in (
        TO_BE_WRITTEN, "license of the base: mit", f"| {train:,.0f} |", "| data/exact_match | 0.75 ± 0.29 | 12 |", "| sft | lora | `{\"r\": 4, \"lora_alpha\": 32}` |",
        "        model: base\n        dataset: data\n        lora: {r: 4}\n", f"revision: {COMMIT}", f"`{here[0].artifacts['sft'].digest[:16]}`", "torch 2.13.0",
    ):  # fmt: skip
        assert text in card.text, text
    assert is_export(request.payload)
    assert author_text(str(card)) is None
    assert re.findall(r"^## (.+)$", card.text, re.MULTILINE) == ["Use", "Intended use", *SECTIONS]


@pytest.mark.parametrize("config", [{"lora": {"r": 4}}, {}, *({name: {}} for name in OTHER_ADAPTERS)], ids=str)
def test_the_card_names_the_kind_of_adapter(config: dict[str, Any]) -> None:
    trained = SimpleNamespace(document={"config": config}, type="Adapter", metrics={})
    made: Any = SimpleNamespace(trained=lambda: [("sft", trained)])
    assert re.findall(r"\| sft \| (\w+) \|", settings_table(made)) == list(config or ["lora"])


def test_weights_cast_and_merged(here: tuple[World, dict[str, str]], tmp_path: Path) -> None:
    merged, cast, small = (tmp_path / name for name in ("merged", "cast", "small"))
    request = request_for(*here, merged, merge=True)
    result, _ = run_program(request)
    assert result.metrics["max_logit_difference"] < 1e-3
    assert "Measured before the merge" in (request.payload / "README.md").read_text()
    model = load_model(Input(path=request.payload, digest="", type="Model"), torch.float32)
    expected = load_model(here[0].input("sft"), torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-3, rtol=1e-3)
    request = request_for(*here, cast, of="merged", dtype="bfloat16")
    run_program(request)
    assert {tensor.dtype for tensor in load_file(request.payload / "model.safetensors").values()} == {torch.bfloat16}
    assert "`merged` itself was not evaluated." in (request.payload / "README.md").read_text()
    assert json.loads((request.payload / "config.json").read_text())["dtype"] == "bfloat16"
    request = request_for(*here, small, dtype="float16", adapter_only=True)
    run_program(request)
    weights = request.payload / "adapter_model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert weights.stat().st_mode == (request.payload / "adapter_config.json").stat().st_mode  # readable by others, too
    assert "Measured before the weights were cast to float16." in (request.payload / "README.md").read_text()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub import constants

    with local_hub() as server:
        for name, value in {**ENVIRONMENT, "HF_ENDPOINT": server.address}.items():
            monkeypatch.setenv(name, value)
        for name, setting in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, setting)  # read when the library was imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


def test_a_push_and_back(world: World, hub: LocalHub, tmp_path: Path) -> None:
    there = described(world, tmp_path / "store", hub="owner/pico")
    request = request_for(*there, tmp_path / "one", push="me/model", revision="v1")
    hub.broken_commits = 1
    with pytest.raises(StageFailed, match=r"push: the hub answers HTTP 500 for me/model at v1") as failed:
        run_program(request)
    assert failed.value.retryable
    assert (hub.uploads, hub.private["me/model"]) == (1, True)

    request = request_for(*there, tmp_path / "two", push="me/model", revision="v1")
    result, _ = run_program(request)
    assert hub.uploads == 1, "what was uploaded is not uploaded again"
    assert [len(commits) for commits in hub.repositories["me/model"].values()] == [0, 1]
    assert result.info["pushed"]["commit"] == hub.commit_id("me/model", "v1")
    assert hub.files("me/model", "v1") == {
        file.relative_to(request.payload).as_posix(): file.read_bytes() for file in request.payload.rglob("*") if file.is_file()
    }
    config = json.loads(hub.files("me/model", "v1")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/pico", COMMIT)
    back = Path(snapshot_download("me/model", revision="v1", cache_dir=tmp_path / "cache"))
    assert (back / "adapter_model.safetensors").read_bytes() == (request.payload / "adapter_model.safetensors").read_bytes()

    hub.private["me/model"] = False
    with pytest.raises(StageFailed, match="push: found the public repository me/model, expected a private one"):
        run_program(request_for(*there, tmp_path / "public", push="me/model", revision="v1"))
    hub.private["me/model"] = True
    request = request_for(*there, tmp_path / "public too", push="me/model", revision="v1", private=False)
    _, events = run_program(request)
    assert any("the repository me/model exists, and stays private" in str(event) for event in events)

    run_program(request_for(*there, tmp_path / "three", push="me/model", revision="v1"))
    assert len(hub.repositories["me/model"]["v1"]) == 1, "the same files are no commit"

    files = dict(hub.files("me/model", "v1"))
    files["README.md"] = files["README.md"].replace(TO_BE_WRITTEN.encode(), b"For tables.")
    files |= {"model-00001-of-00002.safetensors": b"old", "mine.txt": b"mine"}
    hub.repositories["me/model"]["v1"].append(files)
    run_program(request_for(*there, tmp_path / "four", push="me/model", revision="v1", license="mit"))
    now = hub.files("me/model", "v1")
    assert author_text(now["README.md"].decode()) == "For tables."
    assert ("mine.txt" in now, "model-00001-of-00002.safetensors" in now) == (True, False)


def test_a_card_that_the_hub_refuses(world: World, hub: LocalHub, tmp_path: Path) -> None:
    request = request_for(*described(world, tmp_path / "store", hub="owner/pico"), tmp_path / "one", push="me/model", license="none-such")
    with pytest.raises(StageFailed, match='(?s)the hub refuses the model card: .*"license" must be one of') as failed:
        run_program(request)
    assert failed.value.failure_class == "config"
    assert not hub.files("me/model")


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: ours\nlicense_link: LICENSE",
            {"license": "other", "license_name": "ours", "license_link": "LICENSE"},
        ),
        ("license: [mit, apache-2.0]", {"license": "other", "license_name": "mit, apache-2.0"}),
        ("tags: [a]", None),
    ],
)
def test_licenses_of_cards(tmp_path: Path, metadata: str, found: dict[str, str] | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# m\n")
    assert of_card(tmp_path / "README.md") == found
    assert of_card(tmp_path / "none.md") is None


@pytest.mark.parametrize(
    ("environment", "fields", "source", "message"),
    [
        ({"HF_TOKEN": ""}, {}, "owner/pico", "auth: push: found no token for me/model"),
        ({"HF_TOKEN": "another"}, {}, "owner/pico", "auth: push: the hub refuses me/model at main .HTTP 401"),
        ({}, {"push": "others/model"}, "owner/pico", "auth: push: the hub refuses others/model at main .HTTP 403"),
        ({}, {}, None, "config: push: the base of the adapter `sft` is not on the hub"),
    ],
)
def test_pushes_that_are_refused_before_anything_is_written(
    world: World, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], fields: Any,
    source: str | None, message: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    request = request_for(*described(world, tmp_path / "store", hub=source), tmp_path / "one", **{"push": "me/model", **fields})
    with pytest.raises(StageFailed) as failed:
        run_program(request)
    assert f"{failed.value.failure_class}: {failed.value.message}".startswith(message.replace(".HTTP", "(HTTP"))
    assert not list(request.payload.iterdir())
