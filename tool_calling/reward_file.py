"""The reward of --reward: a function in a file of the user, called as TRL's GRPOTrainer calls its own."""

import importlib.util
import math
import sys
import traceback
from functools import cache
from pathlib import Path

from tool_calling.samples import Sample
from tool_calling.scores import read_reference
from tool_calling.terminal import UserError, cut_text


class RewardFile:
    """The function of a `FILE.py:function`, and what is wrong with it in one line."""

    def __init__(self, name: str):
        """Run the file and find the function; UserError if that fails. Its folder is on the path of imports."""
        path, _, function = name.rpartition(":")
        self.name, self.path = f"--reward {name}", Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.name}: {path} is no file; expected FILE.py:function")
        spec = importlib.util.spec_from_file_location("reward_file", self.path)
        if spec is None:
            raise UserError(f"{self.name}: {path} is no Python file; expected FILE.py:function")
        module = sys.modules["reward_file"] = importlib.util.module_from_spec(spec)
        sys.path.append(str(self.path.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.name}: {self.explain(error)}") from None
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise UserError(f"{self.name}: {path} has no function {function}")

    def __call__(self, samples: list[Sample], **given) -> list[float]:
        """Return the reward of each answer, NaN for one that the function leaves open with None.

        Args:
            samples: what is answered, a sample for each answer. Beside what is `given`, the function gets as columns
                what answers.jsonl says of them.
        """
        columns = {
            "source": [sample.source for sample in samples],
            "request": [sample.request for sample in samples],
            "tools": [sample.tools for sample in samples],
            "expected": [sample.completion for sample in samples],
            "expected_calls": [read_reference(sample).calls for sample in samples],
        }
        try:
            found = self.function(**given, **columns)
        except Exception as error:
            raise UserError(f"{self.name}: {self.explain(error)}") from None
        try:
            if any(isinstance(reward, str) for reward in found):
                raise TypeError
            rewards = [math.nan if reward is None else float(reward) for reward in found]
        except (TypeError, ValueError):
            found = cut_text(repr(found))
            raise UserError(f"{self.name}: expected a list of numbers, one for each answer, got {found}") from None
        if len(rewards) != len(samples) or math.inf in map(abs, rewards):
            found = f"{len(rewards)} numbers" if math.inf not in map(abs, rewards) else "an infinite one"
            raise UserError(f"{self.name}: expected {len(samples)} finite numbers, one for each answer, got {found}")
        return rewards

    def explain(self, error: BaseException) -> str:
        """Return the last line of the file that led to an error, and what it says."""
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        places += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
        lines = [line for file, line in places if file and Path(file).resolve() == self.path.resolve()]
        where = f"{self.path}:{lines[-1]}" if lines else str(self.path)
        return f"{where}: {type(error).__name__}: {cut_text(str(error))}"


@cache
def load_reward(name: str) -> RewardFile:
    """Return the function of --reward; its file is run once."""
    return RewardFile(name)
