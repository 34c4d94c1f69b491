"""--reward: a function as TRL calls it, and one line for each mistake in it."""

import math

import pytest
from conftest import WEATHER

from tool_calling.reward_file import RewardFile
from tool_calling.samples import Sample
from tool_calling.terminal import UserError

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SAMPLES = [Sample("rows.jsonl:1", [], 0, CALL, [WEATHER], "rain in Rome?"), Sample("rows.jsonl:2", [], 0, "Hello.")]
GIVEN = {"prompts": ["p1", "p2"], "completions": ["c1", "c22"], "completion_ids": [[1], [2, 3]], "trainer_state": None}


@pytest.fixture
def write(tmp_path):
    """Return a function: source of a file -> the RewardFile of its function `rate`."""

    def make(source: str) -> RewardFile:
        (tmp_path / "mine.py").write_text(source)
        return RewardFile(f"{tmp_path / 'mine.py'}:rate")

    return make


def test_it_gets_what_trl_gives_and_what_answers_jsonl_says(write):
    own = write("def rate(**given):\n    rate.given = given\n    return [0.5, None]\n")
    rewards = own(SAMPLES, **GIVEN)
    assert rewards[0] == 0.5 and math.isnan(rewards[1])
    assert own.function.given == GIVEN | {
        "source": ["rows.jsonl:1", "rows.jsonl:2"],
        "request": ["rain in Rome?", ""],
        "tools": [[WEATHER], []],
        "expected": [CALL, "Hello."],
        "expected_calls": [[{"name": "get_weather", "arguments": {"city": "Rome"}}], []],
    }


def test_a_function_for_trl_may_take_others_of_its_folder_and_return_tensors(write, tmp_path):
    (tmp_path / "beside_mine.py").write_text("SIZE = 2\n")
    source = "import torch\nfrom beside_mine import SIZE\n\n\n"
    source += "def rate(completions, **kwargs):\n    return torch.tensor([len(c) / SIZE for c in completions])\n"
    assert write(source)(SAMPLES, **GIVEN) == [1.0, 1.5]


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [1.0]", "expected 2 finite numbers, one for each answer, got 1 numbers"),
        ("return [1, float('inf')]", "expected 2 finite numbers, one for each answer, got an infinite one"),
        ("return ['1', 2]", "expected a list of numbers, one for each answer, got ['1', 2]"),
        ("return 7", "expected a list of numbers, one for each answer, got 7"),
        ("return [1, [2]]", "expected a list of numbers, one for each answer, got [1, [2]]"),
        ("pass", "expected a list of numbers, one for each answer, got None"),
        ("raise ValueError('a\\nb')", "{path}:2: ValueError: a b"),
        ("return [int(c) for c in completions]", "{path}:2: ValueError: invalid literal for int() with base 10: 'c1'"),
        ("import json; json.loads('x')", "{path}:2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_mistake_in_the_function_is_one_line(write, tmp_path, body, message):
    own = write(f"def rate(completions, **kwargs):\n    {body}\n")
    with pytest.raises(UserError) as error:
        own(SAMPLES, **GIVEN)
    path = tmp_path / "mine.py"
    assert str(error.value) == f"--reward {path}:rate: {message.format(path=path)}"


def test_a_function_that_takes_too_little_is_told_by_its_file(write, tmp_path):
    with pytest.raises(UserError, match="mine.py: TypeError: rate.. got an unexpected keyword argument"):
        write("def rate(prompts, completions):\n    return [1, 2]\n")(SAMPLES, **GIVEN)


@pytest.mark.parametrize(
    "source, message",
    [
        ("rat = 1\n", "{path} has no function rate"),
        ("rate = 1\n", "{path} has no function rate"),
        ("x = 1\nimport no_such_module\n", "{path}:2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def rate(:\n", "{path}:1: SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import sys\nsys.exit(3)\n", "{path}:2: SystemExit: 3"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(write, tmp_path, source, message):
    with pytest.raises(UserError) as error:
        write(source)
    path = tmp_path / "mine.py"
    assert str(error.value) == f"--reward {path}:rate: {message.format(path=path)}"


@pytest.mark.parametrize("name, path", [("no.py:rate", "no.py"), ("no.py", ""), (".:rate", ".")])
def test_a_file_that_is_none(tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        RewardFile(name)
    assert str(error.value) == f"--reward {name}: {path} is no file; expected FILE.py:function"
