"""`chat_template` and `chat_template_kwargs` of a model stage: what they render, what is refused, and a whole line of stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dataset_tools import build_rows
from hub_tools import COMMIT, hub_layout
from pico import save_pico, tokenizer
from program_tools import make_request, payload_digest, run_program
from template_table import SHAPES, more_templates, said, templates, with_markers
from template_tools import ASK, TURN
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.rows import read_split
from tasks.models.chat_template import names_read, with_defaults, with_fixed_clock
from tasks.models.loading import load_tokenizer
from tuneline.errors import StageFailed
from tuneline.workspace.protocol import Input, Request

# As DeepSeek V3.1 writes thoughts: an argument decides what the generation prompt opens or closes.
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>"
    "{{ '<think>' + m.reasoning_content if thinking and m.reasoning_content and loop.last else '' }}</think>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
MACRO = (
    "  {% macro mode() %}{{ mode_name | default('none') }}{% endmacro %}\n\n {{ mode() }}{% for i in [1] %}{{ depth + 1 }}{% endfor %}"
    + TURN
    + ASK
)
KWARGS: dict[str, dict[str, Any]] = {
    "qwen3": {"enable_thinking": False},
    "qwen3_6": {"enable_thinking": False, "preserve_thinking": True},
    "smollm3": {"enable_thinking": False},
    "deepseek": {"thinking": True},
    "glm4moe": {"enable_thinking": False},
    "gptoss": {"reasoning_effort": "high", "model_identity": 'I am "pico" %} {{ é \\ \n 🙂.'},
    "llama3_2": {"date_string": "1 May 2025", "tools_in_user_message": False},
    "nemotron_3_super": {"low_effort": True, "truncate_history_thinking": False},
    "macro": {"mode_name": "loud", "depth": -3},
}


@pytest.fixture(scope="module")
def marked() -> Any:
    return with_markers(tokenizer())


@pytest.mark.parametrize("name", KWARGS)
def test_baked_arguments_render_what_passed_ones_do(name: str, marked: Any) -> None:
    """In the template as it is saved: with a fixed clock, and also where a caller passes the argument itself."""
    given = {**templates(), **more_templates(), "deepseek": DEEPSEEK, "macro": MACRO}[name]
    baked, plain = (with_fixed_clock(text) for text in (with_defaults(given, KWARGS[name]), given))
    assert set(KWARGS[name]) <= names_read(given, marked, "") == names_read(baked, marked, "")
    differ = False
    for row, _, _ in SHAPES.values():
        for prompt in (True, False):
            options = {"tools": row.extra.get("tools"), "tokenize": False, "add_generation_prompt": prompt}

            def rendered(template: str, *, messages: Any = row.messages, options: Any = options, **kwargs: Any) -> str:
                try:
                    return str(marked.apply_chat_template(messages, chat_template=template, **options, **kwargs))
                except Exception as error:
                    return f"refused: {error}"

            assert rendered(baked) == rendered(baked, **KWARGS[name]) == rendered(plain, **KWARGS[name])
            differ = differ or rendered(baked) != rendered(plain)
            first = next(iter(KWARGS[name]))
            assert rendered(baked, **{first: "other"}) == rendered(plain, **KWARGS[name] | {first: "other"})
    assert differ


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: without a template."""
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model", tied=False)
    (folder / "chat_template.jinja").unlink()
    return folder


def request_for(folder: Path, pico: Path, template: str | bytes | None, file: str = "mine.jinja", **fields: Any) -> Request:
    files = {"path": [pico]}
    if template is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(template if isinstance(template, bytes) else template.encode())
        files, fields = files | {"chat_template": [folder / file]}, fields | {"chat_template": file}
    if fields.pop("hub", None):
        return make_request(folder / "run", {"kind": "model", "hub": "tests/pico", **fields}, {}, files=files, commits={"hub": COMMIT})
    return make_request(folder / "run", {"kind": "model", "path": "model", **fields}, {}, files=files)


THINKS = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}<think>{% endif %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endif %}", {}, "chat_template: mine.jinja, line 3: .*endif"),
        ("{{ messages | unheard_of }}", {}, "chat_template: mine.jinja, line 1: No filter named 'unheard_of'"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, {}, "chat_template: mine.jinja: it is nested too deeply"),
        ("{% include 'other' %}", {}, "mine.jinja: it refuses a question: TypeError: no loader"),
        ("{{ raise_exception('never') }}", {}, "mine.jinja: it refuses a question: TemplateError: never"),
        ("# How to chat\n", {}, "mine.jinja: it leaves out what the user says"),
        (json.dumps({"chat_template": TURN + ASK}), {}, "found JSON in mine.jinja, expected a Jinja template"),
        (" \n", {}, "found an empty file, mine.jinja"),
        ("é".encode("latin-1"), {}, "mine.jinja is no UTF-8 text"),
        (THINKS, {"thinks": True}, "found `thinks`, expected an argument that the template reads: think\n"),
        (TURN + ASK, {"think": True}, "found `think`, expected an argument that the template reads: it reads none"),
        ("{% for m in messages %}{% if m %}{% set x = m.content %}{% endif %}{{ x }}{% endfor %}", {"x": 1}, "it reads none"),
        (None, {"think": True}, "found arguments, but the model has no chat template"),
    ],
)
def test_a_template_that_renders_nothing_and_an_argument_without_effect_are_refused(
    pico: Path, tmp_path: Path, template: str | bytes | None, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageFailed, match=message) as failure:
        run_program(request_for(tmp_path, pico, template, chat_template_kwargs=kwargs))
    assert failure.value.failure_class == "config"
    assert failure.value.hint
    if "thinks" in kwargs:
        assert failure.value.hint == "did you mean `think`?"


def test_the_template_is_in_the_payload_whatever_the_source(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of the hub, beside its files; of a local one, beside the reference. The cache and the folder stay as they are."""
    source = Path(shutil.copytree(pico, tmp_path / "model"))
    config = source / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ messages }}"}))
    (source / "chat_template.jinja").write_text("of the model: {{ messages }}")
    hub_layout(tmp_path / "cache", source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    before = {file: file.read_bytes() for folder in (source, tmp_path / "cache") for file in folder.rglob("*") if file.is_file()}

    crlf = ("\ufeff" + THINKS + "\n").replace("\n", "\r\n")
    expected = with_defaults(THINKS, {"think": True})
    digests = []
    for name, hub in (("hub", True), ("path", False)):
        request = request_for(tmp_path / name, source, crlf, chat_template_kwargs={"think": True}, hub=hub)
        result, _ = run_program(request)
        read = load_tokenizer(Input(path=request.payload, digest="", type="Model", template=result.info["template"]))
        assert read.chat_template == expected
        digests.append(payload_digest(request))
    assert AutoTokenizer.from_pretrained(tmp_path / "hub" / "run" / "out" / "payload").chat_template == expected
    assert {file: file.read_bytes() for file in before} == before
    again = request_for(tmp_path / "again", source, THINKS, file="other name.jinja", chat_template_kwargs={"think": True})
    run_program(again)
    assert payload_digest(again) == digests[1]
    without = request_for(tmp_path / "without", source, None)
    run_program(without)
    assert payload_digest(without) != digests[1]


def test_a_template_may_demand_a_system_prompt(pico: Path, tmp_path: Path) -> None:
    demanding = "{% if messages[0].role != 'system' %}{{ raise_exception('No system prompt!') }}{% endif %}" + TURN + ASK
    result, _ = run_program(request_for(tmp_path, pico, demanding))
    assert result.info["template"]


def test_arguments_reach_those_of_several_named_templates_that_read_them(pico: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pico, tmp_path / "model"))
    (source / "chat_template.jinja").write_text(THINKS)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(TURN)
    request = request_for(tmp_path / "run", source, None, chat_template_kwargs={"think": True})
    result, _ = run_program(request)
    read = load_tokenizer(Input(path=request.payload, digest="", type="Model", template=result.info["template"]))
    assert read.chat_template == {"default": with_defaults(THINKS, {"think": True}), "rag": TURN}


# The shape of Qwen3's template in tokens of the pico tokenizer.
SWITCH = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.slow
def test_a_base_model_learns_a_template_of_ones_own_and_everybody_ends_where_we_end(pico: Path, tmp_path: Path) -> None:
    """Model, dataset, training, evaluation, merge, and the merged model in plain transformers, without any argument."""

    def stage(name: str, config: dict[str, Any], **inputs: Input) -> tuple[Request, Any]:
        request = make_request(tmp_path / name, config, {slot.replace("_", "."): given for slot, given in inputs.items()})
        return request, run_program(request)[0]

    request = request_for(tmp_path / "model", pico, SWITCH, chat_template_kwargs={"enable_thinking": False})
    result, _ = run_program(request)
    base = Input(path=request.payload, digest="b" * 64, type="Model", template=result.info["template"])
    nouns = {"owl": "an animal", "fox": "an animal", "oak": "a plant", "rose": "a plant"}
    rows = [
        {"messages": [said("user", f"What is the {noun} no {i}?"), said("assistant", kind)]}
        for i in range(32)
        for noun, kind in nouns.items()
    ]
    built = build_rows(tmp_path, rows, model=base, split={"test": 0.2})
    data = Input(path=built.request.payload, digest="d" * 64, type="Dataset")
    sft = {"kind": "sft", "model": "base", "dataset": "data", "global_batch_size": 16, "learning_rate": 1e-2, "max_steps": 40}
    request, result = stage("sft", sft | {"lora": {"r": 16}}, model=base, dataset=data)
    adapter = Input(path=request.payload, digest="a" * 64, type="Adapter", base=base, template=result.info["template"])
    request, result = stage("merge", {"kind": "merge", "adapters": ["sft"]}, adapters_0=adapter)
    merged = Input(path=request.payload, digest="c" * 64, type="Model", template=result.info["template"])
    scoring = {"kind": "evaluate", "model": "m", "datasets": ["data"], "max_new_tokens": 16, "limit": 20}
    for name, model in (("adapter", adapter), ("merged", merged)):
        _, result = stage(name, scoring, model=model, datasets_0=data)
        assert result.metrics["dataset0/exact_match"] > 0.8
        assert result.metrics["dataset0/stopped"] > 0.8

    words, plain = AutoTokenizer.from_pretrained(merged.path), AutoModelForCausalLM.from_pretrained(merged.path)
    row = read_split(data.path, "test")[0]
    assert row.messages is not None
    prompt = words.apply_chat_template([row.messages[0]], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert words.decode(prompt[0]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    ids = plain.generate(prompt, max_new_tokens=16)[0, prompt.shape[1] :].tolist()  # with its defaults
    assert words.decode(ids) == f"{row.messages[1]['content']}<|im_end|>"
