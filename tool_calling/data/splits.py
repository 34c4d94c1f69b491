"""The split of examples into training and held-out ones, and what would spoil it."""

from collections import Counter

from tool_calling.data.examples import Example
from tool_calling.data.messages import is_trained
from tool_calling.files import digest


def find_first_answer(example: Example) -> int:
    """Return the index of the first assistant message."""
    return next(i for i, message in enumerate(example.messages) if message["role"] == "assistant")


def digest_prompt(example: Example) -> str:
    """Return the digest of the messages before the first answer."""
    return digest(example.messages[: find_first_answer(example)])


def split_examples(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return (training examples, held-out examples), chosen by the hash of the prompt.

    The rows with the smallest hashes are held out. So their order in the file does not matter, a prompt is never on
    both sides, and rows appended later move few others to the other side.
    """
    digests = [digest_prompt(example) for example in examples]
    wanted, held_out = round(len(examples) * share), set()
    for key, size in sorted(Counter(digests).items()):
        if size <= wanted:
            held_out.add(key)
            wanted -= size
    sides = ([], [])
    for key, example in zip(digests, examples):
        sides[key in held_out].append(example)
    return sides


def list_calls(example: Example) -> list[list[str]]:
    """Return the names of the tools that each trained turn calls; turns without a call are left out."""
    trained = filter(is_trained, example.messages)
    turns = [[call["function"]["name"] for call in message.get("tool_calls", [])] for message in trained]
    return [names for names in turns if names]


def find_leaks(examples: list[Example], held_out: list[Example]) -> list[tuple[str, str]]:
    """Return (source, source in training) of each held-out row whose prompt also occurs in training."""
    training = {digest_prompt(example): example.source for example in reversed(examples)}
    return [(example.source, training[key]) for example in held_out if (key := digest_prompt(example)) in training]


def find_warnings(examples: list[Example], held_out: list[Example]) -> list[str]:
    """Return what would spoil the model or its score although every row is valid."""
    found = []
    if any(example.tools for example in examples) and all(map(list_calls, examples)):
        found.append("no row without a call: the model will forget to refuse")
    if leaks := find_leaks(examples, held_out):
        count = f"{len(leaks):,} of {len(held_out):,} held-out rows also occur in training"
        row, twin = leaks[0]
        found.append(f"{count} ({row} is {twin}): their score says nothing about new requests")
    return found
