"""Program side of `rewards:`: each built-in one, functions of the user's, what is refused and in which words. Needs the torch runtime."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pico import save_pico
from program_tools import ROOT, make_request, run_process, run_program
from pydantic import TypeAdapter

from tasks.data.rows import SPLITS, Row, read_split, write_rows
from tasks.sandbox import run as sandbox
from tasks.scoring.rewards import RewardFunction, check_rows, reward_functions
from tuneline.errors import StageFailed
from tuneline.kinds.rewards import Reward
from tuneline.workspace.protocol import Input

REWARDS: TypeAdapter[tuple[Any, ...]] = TypeAdapter(tuple[Reward, ...])
OF_THE_TRAINER = {"trainer_state": object(), "log_extra": print, "log_metric": print}


def make(*rewards: dict[str, Any], file: Path | None = None) -> list[RewardFunction]:
    files = {f"rewards.{i}.file": [file] for i in range(len(rewards)) if file is not None}
    return reward_functions(REWARDS.validate_python(rewards), files)


def call(
    function: RewardFunction,
    completions: list[str],
    answer: str | None = None,
    as_json: bool = True,
    said: list[str] | None = None,
    calls: bool = False,
    **extra: Any,
) -> list[float]:
    """As GRPOTrainer calls it, for one row asked several times."""
    count = len(completions)
    return function(
        prompts=["2 + 2?"] * count,
        completions=completions,
        completion_ids=[list(range(len(completion))) for completion in completions],
        id=["row-1"] * count,
        answer=[answer] * count,
        calls=[calls] * count,
        said=completions if said is None else said,
        extra=[json.dumps(extra) if as_json else extra] * count,
        **OF_THE_TRAINER,
    )


def user_file(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text, encoding="utf-8")
    return file


# --- built in ---------------------------------------------------------------------------------------------------------


def test_exact_match() -> None:
    (reward,) = make({"type": "exact_match"})
    assert reward.__name__ == "exact_match"
    assert call(reward, ["4", " 4\n", "5", "", "The answer is 4"], "4") == [1, 1, 0, 0, 0]


MATH = [  # answer, completion, reward
    ("72", "72", 1),
    ("72", "So it is 70 + 2 = 72.", 1),
    ("72", "It was 72, now it is 73.", 0),
    ("72", "", 0),
    ("72", "I do not know.", 0),
    ("1/2", "The answer is $\\frac{2}{4}$", 1),
    ("\\frac{1}{2}", "\\boxed{0.5}", 1),
    ("0.5", "1/2", 1),
    ("1,000", "1000", 1),
    ("2*x+1", "$1 + 2x$", 1),
    ("2*x+1", "2", 0),
    ("$x^2 - 1$", "$(x - 1)(x + 1)$", 1),
    ("\\sqrt{8}", "$2\\sqrt{2}$", 1),
    ("(1, 2)", "$(1, 2)$", 1),
    ("-4", "4", 0),
    ("Paris", "Paris", 1),
    ("Paris", "\\boxed{Paris}", 1),
]


@pytest.mark.parametrize(("answer", "completion", "expected"), MATH, ids=range(len(MATH)))
def test_math_equal(answer: str, completion: str, expected: float) -> None:
    (reward,) = make({"type": "math_equal"})
    assert call(reward, [completion], answer) == [expected]


@pytest.mark.slow
def test_math_equal_ends_formulas_that_never_end() -> None:
    (reward,) = make({"type": "math_equal"})
    assert call(reward, ["$9^{9^{9^{9}}}$", "$" + "{" * 2000 + "4" + "}" * 2000 + "$", "$99999999!$", "4"], "4") == [0, 0, 0, 1]


def test_a_busy_machine_does_not_change_math_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on while other processes have the cores; what counts is the time that the formula itself took."""
    import math_verify

    parse = math_verify.parse

    def on_a_busy_machine(text: str, **options: object) -> object:
        time.sleep(0.2)
        return parse(text, **options)

    (reward,) = make({"type": "math_equal"})
    monkeypatch.setattr("tasks.scoring.rewards.MATH_SECONDS", 0.1)
    monkeypatch.setattr("math_verify.parse", on_a_busy_machine)
    assert call(reward, ["it is $\\frac{8}{2}$", "5"], "4") == [1, 0]


def test_answers_are_compared_without_thoughts_and_functions_of_ones_own_see_them(tmp_path: Path) -> None:
    text = "def longest(prompts, completions, **columns):\n    assert sorted(columns) == ['answer', 'id']\n    return [len(c) for c in completions]\n"
    whole, said = ["thought: 5 finally 4", "thought: it is 4"], ["4", ""]  # the second was cut off while it was thinking
    exact, equal, form, own = make(
        {"type": "exact_match"}, {"type": "math_equal"}, {"type": "format", "pattern": "thought.*"}, {"file": "mine.py", "function": "longest"},
        file=user_file(tmp_path, text),
    )  # fmt: skip
    assert [call(reward, whole, "<think>2 + 2</think>4", said=said) for reward in (exact, equal)] == [[1, 0], [1, 0]]
    assert [call(reward, whole, "4", said=said) for reward in (form, own)] == [[1, 1], [20, 16]]


def test_calls_are_compared_as_calls() -> None:
    (reward,) = make({"type": "exact_match"})
    completions = ['play {"b": 1, "a": 2}', 'play {"a": 2, "b": 3}', ""]
    assert call(reward, completions, 'play {"a": 2, "b": 1}', calls=True) == [1, 0, 0]
    assert call(reward, completions, 'play {"a": 2, "b": 1}') == [0, 0, 0]


def test_format() -> None:
    (reward,) = make({"type": "format", "pattern": r"<think>.*</think>\s*<answer>\d+</answer>"})
    right = "\n<think>two\nlines</think>\n<answer>4</answer>\n"
    assert call(reward, [right, right + "!", "4", "", "<think></think><answer>four</answer>"]) == [1, 0, 0, 0, 0]


def test_length() -> None:
    (reward,) = make({"type": "length", "full_up_to": 10, "zero_from": 20})
    assert call(reward, ["x" * count for count in (0, 10, 11, 15, 19, 20, 99)]) == pytest.approx([1, 1, 0.9, 0.5, 0.1, 0, 0])
    (steep,) = make({"type": "length", "full_up_to": 0, "zero_from": 1})
    assert call(steep, ["", "x"]) == [1, 0]


@pytest.mark.parametrize("as_json", [True, False])
def test_reasoning_gym_scores_as_its_own_scorer_does(as_json: bool) -> None:
    import reasoning_gym

    entry = json.loads(json.dumps(reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]))
    (reward,) = make({"type": "reasoning_gym"})
    scores = call(reward, [f" {entry['answer']}\n", "no", ""], scorer={"dataset": "chain_sum", "entry": entry}, as_json=as_json)
    assert scores[0] == 1
    assert max(scores[1:]) < 0.1


# --- python_tests -----------------------------------------------------------------------------------------------------


def sandboxed() -> bool:
    try:
        sandbox.check()
    except StageFailed:
        return False
    return True


needs_sandbox = pytest.mark.skipif(
    not sandboxed(), reason="this machine makes no sandbox; tests/program/test_sandbox.py covers the refusal"
)
RIGHT = "def double(x):\n    return 2 * x"
TESTS = "assert double(2) == 4\nassert double(-1) == -2"


@needs_sandbox
def test_python_tests() -> None:
    (reward,) = make({"type": "python_tests", "memory_mb": 256})
    completions = {
        RIGHT: 1,
        f"Here it is:\n```python\n{RIGHT}\n```\nDone.": 1,
        f"```python\nwrong(\n```\nor rather\n```python\n{RIGHT}\n```": 1,
        f"```py\n{RIGHT}": 1,  # cut off at the longest length
        f"```python\n{RIGHT}\n```\n```python\ndef double(x):\n    return x\n```": 0,  # the last one counts
        "def double(x):\n    return x": 0,
        "I cannot do that.": 0,
        "": 0,
        f"{RIGHT}\nraise SystemExit(0)": 0,
        f"{RIGHT}\nimport os\nos._exit(0)": 0,
        'double = """': 0,
    }
    assert call(reward, list(completions), tests=TESTS) == list(completions.values())
    assert call(reward, [RIGHT], tests=TESTS.splitlines()) == [1]
    assert call(reward, [RIGHT], tests=[*TESTS.splitlines(), "assert double(3) == 7"]) == [0]


@needs_sandbox
@pytest.mark.slow
def test_python_tests_end_what_does_not_end_and_what_wants_the_network_or_much_memory(tmp_path: Path) -> None:
    (reward,) = make({"type": "python_tests", "seconds": 4, "memory_mb": 256})
    mark = tmp_path / "mark"
    completions = [
        f"{RIGHT}\nwhile True: pass",
        f"{RIGHT}\nimport time\ntime.sleep(600)",
        f"{RIGHT}\nimport socket\nsocket.create_connection(('127.0.0.1', 1), 1)",
        f"{RIGHT}\nimport urllib.request\nurllib.request.urlopen('http://192.0.2.1', timeout=1)",
        f"{RIGHT}\nx = bytearray(1 << 30)",
        f"{RIGHT}\nopen({str(mark)!r}, 'w').write('x')",
        RIGHT,
    ]
    assert call(reward, completions, tests=TESTS) == [0, 0, 0, 0, 0, 0, 1]
    assert not mark.exists()


# --- functions of the user's ------------------------------------------------------------------------------------------

GOOD = '''
from dataclasses import dataclass

@dataclass
class Wanted:
    word: str

def score(prompts, completions, **columns):
    """Counts the row's word."""
    assert sorted(columns) == ["answer", "id", "word"], columns
    return [completion.count(Wanted(word).word) for completion, word in zip(completions, columns["word"])]
'''


def test_a_function_gets_lists_of_columns(tmp_path: Path) -> None:
    file = user_file(tmp_path, GOOD)
    (reward,) = make({"file": "mine.py", "function": "score"}, file=file)
    assert reward.__name__ == "score"
    values = call(reward, ["a a", "a", "b"], "4", word="a")
    assert values == [2.0, 1.0, 0.0]
    assert all(type(value) is float for value in values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]  # no cache beside it
    assert "mine" not in sys.modules


def test_a_function_as_trl_documents_them_works_and_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    trl = "def score(completions, answer, **kwargs):\n    return [c == a for c, a in zip(completions, answer)]\n"
    (reward,) = make({"file": "mine.py", "function": "score"}, file=user_file(tmp_path, trl))
    assert call(reward, ["4", "5"], "4") == [1.0, 0.0]
    (edited,) = make({"file": "mine.py", "function": "score"}, file=user_file(tmp_path, trl.replace("c == a", "c != a")))
    assert call(edited, ["4", "5"], "4") == [0.0, 1.0]


def test_columns_of_rows_that_differ_are_none_where_a_row_has_none(tmp_path: Path) -> None:
    text = "def score(prompts, completions, **columns):\n    assert columns['a'] == [1, None]\n    assert columns['b'] == [None, 2]\n    return [0, 0]\n"
    (reward,) = make({"file": "mine.py", "function": "score"}, file=user_file(tmp_path, text))
    ids = {"completion_ids": [[], []], "id": ["1", "2"], "answer": [None, None], "calls": [False, False], "said": ["c", "c"]}
    assert reward(prompts=["p", "p"], completions=["c", "c"], extra=['{"a": 1}', '{"b": 2}'], **ids) == [0.0, 0.0]


HEAD = "def score(prompts, completions, **columns):\n    "
BAD_VALUES = {
    "nan": (
        "return [0.0, float('nan')]",
        "reward `score` returned nan, expected a number from -1e+06 to 1e+06, for completion of row row-1:",
    ),
    "too large": ("return [0.0, 1e38]", "returned 1e+38, expected a number from -1e+06 to 1e+06"),
    "an interrupt of its own": ("raise KeyboardInterrupt", "reward `score` KeyboardInterrupt:  (FILE:2)"),
    "infinite": ("return [0.0, float('inf')]", "returned inf, expected a number from"),
    "none in it": ("return [0.0, None]", "returned None, expected a number from"),
    "text": ("return ['0', '1']", "returned '0', expected a number from"),
    "complex": ("return [0, 1j]", "returned 1j, expected a number from"),
    "too few": ("return [0.0]", "returned a list of 1, expected a list of 2 numbers, one for each completion"),
    "too many": ("return [0.0] * 3", "returned a list of 3, expected a list of 2 numbers"),
    "nothing": ("pass", "returned NoneType, expected a list of 2 numbers"),
    "a number": ("return 1.0", "returned float, expected a list of 2 numbers"),
    "no list": ("return (1.0 for _ in prompts)", "returned generator, expected a list of 2 numbers"),
    "raises": (
        "return [len(completions) / 0, 0]",
        "ZeroDivisionError: division by zero (FILE:2), on 2 completions, the first of row row-1:",
    ),
    "raises deeper": (
        "import json\n    return [json.loads(c) for c in completions]",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (FILE:3), on",
    ),
    "exits": ("raise SystemExit(3)", "SystemExit: 3 (FILE:2)"),
    "missing column": ("return columns['word']", "KeyError: 'word' (FILE:2)"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_end_the_stage_with_the_sample(tmp_path: Path, case: str) -> None:
    body, message = BAD_VALUES[case]
    file = user_file(tmp_path, HEAD + body + "\n")
    (reward,) = make({"file": "mine.py", "function": "score"}, file=file)
    with pytest.raises(StageFailed, match="reward `score`") as failure:
        call(reward, ["first", "second"], "4")
    assert failure.value.failure_class == "data"
    assert message.replace("FILE", str(file)) in failure.value.message
    sample = "second" if case in ("nan", "too large", "infinite", "none in it", "complex") else "first"
    assert failure.value.message.endswith(f"\n  prompt: '2 + 2?'\n  completion: '{sample}'\n  answer: '4'")
    assert failure.value.hint == "a reward must accept any text that a model writes: fix mine.py"
    assert ("Traceback" in failure.value.details) == ("FILE" in message)


def test_a_built_in_one_that_raises_is_told_the_same_way() -> None:
    (reward,) = make({"type": "reasoning_gym"})
    with pytest.raises(StageFailed, match=r"^reward `reasoning_gym` KeyError: 'dataset' \(.*scores\.py:\d+\), on 1 completions") as failure:
        call(reward, ["4"], scorer={})
    assert failure.value.failure_class == "data"


SIGNATURE = "write `def score(prompts: list[str], completions: list[str], **columns) -> list[float]: ...`"
BAD_FILES = {
    "misspelt": (
        "def scores(prompts, completions, **columns): ...",
        "FILE: found no function `score`, expected scores",
        "did you mean `scores`?",
    ),
    "none": ("from math import sqrt\nx = 1", "FILE: found no function `score`, expected a file that defines one", SIGNATURE),
    "value": ("score = 1", "FILE: found `score` as int, expected a function", SIGNATURE),
    "no columns": (
        "\ndef score(prompts, completions): ...",
        "FILE:2: found `score(prompts, completions)`, expected (prompts, completions, **columns)",
        SIGNATURE,
    ),
    "no completions": ("def score(a, **columns): ...", "FILE:1: found `score(a, **columns)`, expected", SIGNATURE),
    "by position alone": (
        "def score(prompts, completions, /, **columns): ...",
        "FILE:1: found `score(prompts, completions, /, **columns)`, expected",
        SIGNATURE,
    ),
    "async": (
        "async def score(prompts, completions, **columns): ...",
        "FILE:1: found `score` as an async function, expected a plain function",
        SIGNATURE,
    ),
    "generator": ("def score(prompts, completions, **columns):\n    yield 1", "FILE:1: found `score` as a generator, expected", SIGNATURE),
    "syntax": ("x = 1\ndef score(:\n", "FILE:2: the file does not load: SyntaxError: invalid syntax", "correct it"),
    "raises": ("x = 1\nx.y\n", "FILE:2: the file does not load: AttributeError: 'int' object has no attribute 'y'", "correct it"),
    "exits": ("raise SystemExit(1)", "FILE:1: the file does not load: SystemExit: 1", "correct it"),
    "opens": ("open('/nowhere')", "FILE:1: the file does not load: FileNotFoundError", "correct it"),
    "imports": (
        "import my_helpers",
        "FILE:1: the file does not load: ModuleNotFoundError: No module named 'my_helpers'",
        "it can import what its stage's runtime holds, but no files beside it: only its own content is in the key",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_before_anything_runs(tmp_path: Path, case: str) -> None:
    text, message, hint = BAD_FILES[case]
    (tmp_path / "my_helpers.py").write_text("")
    file = user_file(tmp_path, text)
    with pytest.raises(StageFailed, match=r"mine\.py") as failure:
        make({"file": "mine.py", "function": "score"}, file=file)
    assert failure.value.failure_class == "config"
    assert failure.value.message.startswith(message.replace("FILE", str(file)))
    assert failure.value.hint == hint


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"gone\.py: found no file, expected a Python file") as failure:
        make({"file": "gone.py", "function": "score"}, file=tmp_path / "gone.py")
    assert failure.value.failure_class == "config"
    with pytest.raises(StageFailed, match="reward `score`: found a.py, b.py for [*].py, expected one file"):
        reward_functions(REWARDS.validate_python([{"file": "*.py", "function": "score"}]), {"rewards.0.file": [Path("a.py"), Path("b.py")]})


# --- rows -------------------------------------------------------------------------------------------------------------

ROW = Row("sources.0", prompt="2 + 2?", answer="4", id="good", extra={"scorer": {}, "tests": "assert True"})
BARE = Row("sources.0", prompt="2 + 2?", id="bare")
LACKING = {
    "exact_match": (BARE, "reward `exact_match`: 1 of 3 rows have no answer, the first bare"),
    "math_equal": (BARE, "reward `math_equal`: 1 of 3 rows have no answer, the first bare"),
    "reasoning_gym": (BARE, "reward `reasoning_gym`: 1 of 3 rows have no scorer of reasoning-gym, the first bare"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_rows_that_lack_what_a_reward_needs_are_named(kind: str) -> None:
    row, message = LACKING[kind]
    functions = make({"type": kind})
    check_rows(functions, [ROW, ROW])
    with pytest.raises(StageFailed, match=f"^{message}\n") as failure:
        check_rows(functions, [ROW, row, ROW])
    assert failure.value.failure_class == "data"
    assert failure.value.hint


def test_rewards_that_need_nothing_take_any_row() -> None:
    check_rows(make({"type": "format", "pattern": "."}, {"type": "length", "full_up_to": 1, "zero_from": 2}), [BARE])


def test_an_answer_that_is_no_formula_is_refused() -> None:
    with pytest.raises(StageFailed, match=r"1 of 1 rows have an answer that math-verify cannot read \('costs \$'\), the first odd"):
        check_rows(make({"type": "math_equal"}), [Row("sources.0", prompt="p", answer="costs $", id="odd")])


@needs_sandbox
@pytest.mark.parametrize(
    ("tests", "found"), [(None, "no `tests`"), ("", "`tests` that are not text"), ([], "`tests` that are not"), ([1], "`tests` that")]
)
def test_tests_must_be_text(tests: Any, found: str) -> None:
    functions = make({"type": "python_tests"})
    check_rows(functions, [ROW])
    with pytest.raises(StageFailed, match=f"reward `python_tests`: 1 of 1 rows have {found}"):
        check_rows(functions, [Row("sources.0", prompt="p", id="x", extra={} if tests is None else {"tests": tests})])


def test_columns_that_a_function_takes_by_name_must_be_there(tmp_path: Path) -> None:
    text = "def score(completions, prompts, answer, tests, width=3, **columns): ..."
    functions = make({"file": "mine.py", "function": "score"}, file=user_file(tmp_path, text))
    check_rows(functions, [ROW])
    with pytest.raises(StageFailed, match="reward `score`: 1 of 2 rows have no column tests, the first bare") as failure:
        check_rows(functions, [ROW, BARE])
    assert failure.value.failure_class == "data"


# --- from a file of rows to a reward ----------------------------------------------------------------------------------


@needs_sandbox
def test_columns_travel_from_a_jsonl_through_a_dataset_to_rewards(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Write double.", "tests": TESTS, "extra": {"level": 1}},
        {
            "prompt": [{"role": "user", "content": "Write double, please."}],
            "tests": TESTS.splitlines(),
            "answer": "double",
            "extra": '{"level": 2}',
        },
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {"kind": "dataset", "sources": [{"type": "files", "path": "rows.jsonl"}], "split": {"test": 0.0}}
    request = make_request(tmp_path / "run", config, {}, files={"sources.0.path": [file]})
    run_program(request)
    found = read_split(request.payload, "train")
    assert [row.extra["level"] for row in found] == [1, 2]
    text = "def level(prompts, completions, level, **columns):\n    return [n + len(t) / 1000 for n, t in zip(level, columns['tests'])]\n"
    functions = make({"type": "python_tests", "memory_mb": 256}, {"file": "mine.py", "function": "level"}, file=user_file(tmp_path, text))
    check_rows(functions, found)
    columns = {
        "id": [row.id for row in found],
        "answer": [row.answer for row in found],
        "calls": [row.calls() for row in found],
        "said": [RIGHT, "pass"],
        "extra": [json.dumps(row.extra) for row in found],
    }
    values = [f(prompts=["p", "p"], completions=[RIGHT, "pass"], completion_ids=[[1], [1]], **columns) for f in functions]
    assert values == [[1, 0], [1 + len(TESTS) / 1000, 2.002]]


def test_the_example_of_the_docs_page_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    text = page.split("```python\n")[1].split("```")[0]
    (reward,) = make({"file": "rewards/mine.py", "function": "brevity"}, file=user_file(tmp_path, text))
    assert call(reward, ["4", "It is 4", "5", ""], "4") == [1.0, pytest.approx(1 / 3), 0.0, 0.0]


@pytest.mark.slow
def test_a_training_calls_them_and_a_bad_value_ends_it_with_the_sample(tmp_path: Path) -> None:
    text = '''
calls = 0

def brevity(prompts, completions, level, **columns):
    """The second time, one number is missing."""
    global calls
    calls += 1
    assert sorted(columns) == ["answer", "id"] and level == [1] * 8, (columns, level)
    return [1 / (1 + len(completion)) for completion in completions][: 8 if calls < LAST else 7]
'''
    base = Input(path=save_pico(tmp_path / "model"), digest="b" * 64, type="Model")
    rows = [
        Row("s", messages=({"role": "user", "content": f"{i} + {i}?"},), answer=str(2 * i), extra={"level": 1}, id=f"row{i}")
        for i in range(4)
    ]
    (tmp_path / "data").mkdir()
    for split in SPLITS:
        write_rows(rows if split == "train" else [], tmp_path / "data" / f"{split}.parquet")
    inputs = {"model": base, "dataset": Input(path=tmp_path / "data", digest="d" * 64, type="Dataset")}
    rewards = [{"type": "math_equal"}, {"file": "mine.py", "function": "brevity"}]
    config = {"kind": "grpo", "model": "base", "dataset": "data", "rewards": rewards, "max_steps": 2, "max_completion_length": 4}
    config |= {"global_batch_size": 8, "num_generations": 4, "lora": {"r": 4, "lora_alpha": 8}}
    file = user_file(tmp_path, text.replace("LAST", "99"))
    good = make_request(tmp_path / "good", config, inputs, files={"rewards.1.file": [file]})
    done = run_process(good)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((good.work / "result.json").read_text())["metrics"]
    assert {"reward/math_equal", "reward/brevity"} <= metrics.keys()
    assert 0 < metrics["reward/brevity"] < 1

    file = user_file(tmp_path, text.replace("LAST", "2"))
    bad = make_request(tmp_path / "bad", config, inputs, files={"rewards.1.file": [file]})
    assert run_process(bad).returncode == 1
    failure = json.loads((bad.work / "failure.json").read_text())
    assert failure["class"] == "data"
    assert failure["message"].startswith(
        "reward `brevity` returned a list of 7, expected a list of 8 numbers, one for each completion, the first of row row"
    )
    assert "\n  prompt: '" in failure["message"]
