"""The split of examples into training and held-out ones, and what would spoil it."""

from collections import Counter

from tool_calling.data.examples import Example
from tool_calling.data.messages import is_trained
from tool_calling.files import digest
from tool_calling.terminal import UserError


def find_first_answer(example: Example) -> int:
    """Return the index of the first assistant message after a user message, or else of the first one at all."""
    roles = [message["role"] for message in example.messages]
    return roles.index("assistant", roles.index("user") if "user" in roles[:-1] else 0)


def digest_tools(examples: list[Example]) -> list[str]:
    """Return the digest of each example's tools; most examples share one list, which is digested once."""
    digests = {key: digest(tools) for key, tools in {id(row.tools): row.tools for row in examples}.items()}
    return [digests[id(row.tools)] for row in examples]


def check_one_list(examples: list[Example], part: str) -> None:
    """Refuse rows with different tools, in whatever order, for prompts that have none; rows without any may be."""
    rows = {id(row.tools): row for row in reversed(examples) if row.tools}  # most share one list, digested once
    lists = {} if part == "all" else {digest(sorted(row.tools, key=digest)): row.source for row in rows.values()}
    if len(lists) > 1:
        *_, second, first = lists.values()
        found = f"{first} and {second} bring different tools, which prompts without the list cannot tell apart"
        raise UserError(f"--tools_in_prompt none: {found}; give all rows the same list, or leave out the flag")


def digest_prompts(examples: list[Example]) -> list[str]:
    """Return the digest of each example's request: its tools, and its messages before the first answer."""
    requests = [example.messages[: find_first_answer(example)] for example in examples]
    return [digest(request) for request in zip(digest_tools(examples), requests)]


def split_examples(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return (training examples, held-out examples), chosen by the hash of the request.

    The smallest hashes are held out. So the order of the file does not matter, no request is on both sides, and rows
    appended later move few others to the other side.
    """
    digests = digest_prompts(examples)
    wanted, held_out = round(len(examples) * share), set()
    for key, size in sorted(Counter(digests).items()):
        if size <= wanted:
            held_out.add(key)
            wanted -= size
    sides = ([], [])
    for key, example in zip(digests, examples):
        sides[key in held_out].append(example)
    return sides


def split_folds(examples: list[Example], count: int) -> list[int]:
    """Return in which of `count` folds each example is: its request's place among all hashes decides.

    So equal requests are in one fold, the order of the file does not matter, and folds are of about the same size.
    """
    digests = digest_prompts(examples)
    places = {key: place % count for place, key in enumerate(sorted(set(digests)))}
    return [places[key] for key in digests]


def list_calls(example: Example) -> list[list[str]]:
    """Return the names of the tools that each trained turn calls; turns without a call are left out."""
    calls = [message.get("tool_calls") for message in filter(is_trained, example.messages)]
    return [[call["function"]["name"] for call in turn] for turn in calls if turn]


def count_thinking(examples: list[Example]) -> int:
    """Return how many rows have a trained answer with reasoning."""
    return sum(any("reasoning_content" in turn for turn in filter(is_trained, row.messages)) for row in examples)


def is_thinking(examples: list[Example]) -> bool:
    """Return whether most rows are trained with reasoning; the model is then served with it."""
    return 2 * count_thinking(examples) >= len(examples) > 0


def find_leaks(examples: list[Example], held_out: list[Example]) -> list[tuple[str, str]]:
    """Return (source, source in training) of each held-out row whose request also occurs in training."""
    training = {key: example.source for key, example in reversed([*zip(digest_prompts(examples), examples)])}
    pairs = zip(digest_prompts(held_out), held_out)
    return [(example.source, training[key]) for key, example in pairs if key in training]


def find_warnings(examples: list[Example], held_out: list[Example]) -> list[str]:
    """Return what would spoil the model or its score although every row is valid."""
    found = []
    if any(example.tools for example in examples) and all(map(list_calls, examples)):
        found.append("no row without a call: the model will forget to refuse")
    if 0 < (count := count_thinking(examples)) < len(examples):
        served = f"the model is served {'with' if is_thinking(examples) else 'without'} it, as most rows are trained"
        advice = "--thinking off drops it, --thinking on requires it"
        found.append(f"{count:,} of {len(examples):,} rows have reasoning: {served}; {advice}")
    if leaks := find_leaks(examples, held_out):
        count = f"{len(leaks):,} of {len(held_out):,} held-out rows also occur in training"
        row, twin = leaks[0]
        found.append(f"{count} ({row} is {twin}): their score says nothing about new requests")
    return found
