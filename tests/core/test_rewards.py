"""The list `rewards:` of a grpo stage: types, labels, keys and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from load_tools import GOOD, load_text

from tuneline.canonical import key_of
from tuneline.errors import ConfigError
from tuneline.kinds.fields import OutsideFile, annotated_values
from tuneline.kinds.grpo import GrpoStage
from tuneline.kinds.rewards import FunctionReward
from tuneline.planning.keys import Outside, key_document

ROOT = Path(__file__).resolve().parents[2]
TYPES = "exact_match, math_equal, format, reasoning_gym, length, python_tests, function"


def grpo(rewards: str) -> str:
    return GOOD + "      grpo:\n        {kind: grpo, model: base, dataset: data, rewards: [\n" + f"        {rewards}]}}\n"


def stage(rewards: str) -> GrpoStage:
    found = load_text(grpo(rewards)).spec.pipelines["demo"].stages["grpo"]
    assert isinstance(found, GrpoStage)
    return found


def test_every_type_loads_and_is_labelled() -> None:
    rewards = stage(
        "{type: exact_match}, {type: math_equal, weight: 2.0}, {type: format, pattern: '<a>.*</a>'}, {type: reasoning_gym},"
        "{type: length, full_up_to: 10, zero_from: 20, weight: -0.5}, {type: python_tests, seconds: 2.5, memory_mb: 256},"
        "{type: function, file: rewards/mine.py, function: brevity}"
    ).rewards
    assert [reward.label for reward in rewards] == [*TYPES.split(", ")[:-1], "brevity"]
    assert [reward.weight for reward in rewards] == [1, 2, 1, 1, -0.5, 1, 1]


def test_a_function_needs_no_type() -> None:
    (reward,) = stage("{file: rewards/mine.py, function: score}").rewards
    assert reward == FunctionReward(type="function", file="rewards/mine.py", function="score")
    assert reward == stage("{type: function, file: rewards/mine.py, function: score}").rewards[0]


def test_the_file_is_an_outside_file_and_its_path_not_in_the_key() -> None:
    found = stage("{type: exact_match}, {file: a.py, function: score}")
    assert [(path, named) for path, _, named in annotated_values(found, OutsideFile)] == [("rewards.1.file", "a.py")]

    def key(rewards: str, digest: str = "1") -> str:
        document = key_document(stage(rewards), 1, {}, Outside(files={"rewards.1.file": digest}))
        assert "a.py" not in str(document)
        return key_of(document)

    first = key("{type: exact_match}, {file: a.py, function: score}")
    assert first == key("{type: exact_match}, {type: function, file: b.py, function: score, weight: 1.0}")
    others = (
        key("{type: exact_match}, {file: a.py, function: score}", "2"),
        key("{type: exact_match}, {file: a.py, function: other}"),
        key("{type: exact_match}, {file: a.py, function: score, weight: 2.0}"),
        key("{type: math_equal}, {file: a.py, function: score}"),
    )
    assert len({first, *others}) == 5


# fmt: off
BAD = {
    "no type": ("{weight: 2.0}", f"p.yaml:15:9: demo.grpo.rewards.0: found no `type`, expected {TYPES}\n\nhint: add `type: ...`"),
    "type misspelt": ("{type: exact_math}", f"p.yaml:15:16: demo.grpo.rewards.0.type: found 'exact_math', expected {TYPES}\n\nhint: did you mean `exact_match`?"),
    "type null": ("{type: }", f"p.yaml:15:15: demo.grpo.rewards.0.type: found nothing, expected {TYPES}"),
    "no mapping": ("exact_match", "p.yaml:15:9: demo.grpo.rewards.0: found 'exact_match', expected a mapping\n\nhint: write `{type: exact_match}`"),
    "none": ("", "p.yaml:14:59: demo.grpo.rewards: found an empty list, expected at least 1"),
    "unknown field": ("{type: length, full_up_to: 1, zero_from: 2, max: 3}", "p.yaml:15:53: demo.grpo.rewards.0.max: found the unknown field `max`, expected type, weight, full_up_to, zero_from"),
    "unknown field of a name shared with a source": ("{type: reasoning_gym, task: sums}", "p.yaml:15:31: demo.grpo.rewards.0.task: found the unknown field `task`, expected type, weight"),
    "unknown field without type": ("{file: a.py, function: f, wieght: 2}", "p.yaml:15:35: demo.grpo.rewards.0.wieght: found the unknown field `wieght`, expected type, weight, file, function\n\nhint: did you mean `weight`?"),
    "function without file": ("{function: score}", "p.yaml:15:9: demo.grpo.rewards.0.file: found nothing, expected a value (Python file that defines the function. Its content is in the cache key; modules that it imports are not)\n\nhint: add `file: rewards.py`"),
    "file without function": ("{file: a.py}", "p.yaml:15:9: demo.grpo.rewards.0.function: found nothing, expected a value (Name of the function: it takes prompts and completions, and returns one number per completion)\n\nhint: add `function: my_reward`"),
    "function of a number": ("{file: a.py, function: 3}", "p.yaml:15:32: demo.grpo.rewards.0.function: found 3, expected text\n\nhint: put quotes around it"),
    "function in a file": ("{file: a.py, function: a.score}", "p.yaml:15:32: demo.grpo.rewards.0.function: found 'a.score', expected the name of a function\n\nhint: write only the name here, and the file under `file:`"),
    "empty pattern": ("{type: format, pattern: ''}", "p.yaml:15:33: demo.grpo.rewards.0.pattern: found '', expected text that is not empty"),
    "file outside": ("{file: ../a.py, function: score}", "p.yaml:15:16: demo.grpo.rewards.0.file: found '../a.py', expected a path inside the folder of the file\n\nhint: add `roots: [..]` at the top of the file"),
    "weight nought": ("{type: exact_match, weight: 0}", "p.yaml:15:37: demo.grpo.rewards.0.weight: found 0, expected a number other than 0\n\nhint: remove the reward if it should not count"),
    "weight infinite": ("{type: exact_match, weight: .inf}", "p.yaml:15:37: demo.grpo.rewards.0.weight: found .inf, expected finite numbers\n\nhint: put quotes around it if it is text"),
    "weight as text": ("{type: exact_match, weight: much}", "p.yaml:15:37: demo.grpo.rewards.0.weight: found 'much', expected a number"),
    "pattern": ("{type: format, pattern: '<a>(.*</a>'}", "p.yaml:15:33: demo.grpo.rewards.0.pattern: found '<a>(.*</a>', expected a regular expression: missing ), unterminated subpattern at position 3\n\nhint: in YAML, single quotes keep backslashes: '<answer>\\d+</answer>'"),
    "no pattern": ("{type: format}", "p.yaml:15:9: demo.grpo.rewards.0.pattern: found nothing, expected a value (Python regular expression that the whole completion must match, ignoring surrounding whitespace; `.` also matches newlines)\n\nhint: add `pattern: '<answer>.*</answer>'`"),
    "length": ("{type: length, full_up_to: 20, zero_from: 20}", "p.yaml:15:51: demo.grpo.rewards.0.zero_from: found 20, expected more than full_up_to, 20"),
    "memory": ("{type: python_tests, memory_mb: 8}", "p.yaml:15:41: demo.grpo.rewards.0.memory_mb: found 8, expected at least 128"),
    "twice": ("{type: exact_match}, {type: math_equal}, {type: exact_match}", "p.yaml:15:50: demo.grpo.rewards.2: found `exact_match` twice, first in rewards.0\n\nhint: remove one of them"),
    "function twice": ("{file: a.py, function: score}, {file: b.py, function: score}", "p.yaml:15:63: demo.grpo.rewards.1.function: found `score` twice, first in rewards.0\n\nhint: rename one function: each has its own metric"),
    "function named as a type": ("{type: length, full_up_to: 1, zero_from: 2}, {file: a.py, function: length}", "p.yaml:15:77: demo.grpo.rewards.1.function: found `length` twice, first in rewards.0\n\nhint: rename one function: each has its own metric"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_in_full(case: str) -> None:
    rewards, message = BAD[case]
    with pytest.raises(ConfigError, match="demo") as caught:
        load_text(grpo(rewards))
    assert str(caught.value) == message


def test_a_stage_or_pipeline_named_rewards_gets_messages_of_its_own() -> None:
    text = GOOD.replace("data:   {", "rewards: {").replace("dataset: data", "dataset: rewards").replace("[data]", "[rewards]")
    with pytest.raises(ConfigError, match=r"demo\.rewards\.sources\.0\.type: found 'file', expected files, hub, reasoning_gym, code\n"):
        load_text(text.replace("type: files", "type: file"))
    text = GOOD.replace("demo:", "rewards:").replace("sft:    {kind: sft,", "function: {kind: sft, learning_rate: fast,")
    with pytest.raises(ConfigError, match=r"rewards\.function\.learning_rate: found 'fast', expected a number$"):
        load_text(text.replace("[sft]", "[function]").replace("model: sft", "model: function"))
