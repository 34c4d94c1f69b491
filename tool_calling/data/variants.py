"""Examples with other lists of tools: in another order, under other names, without some of them."""

import random
import re
from collections import Counter
from itertools import chain
from typing import NamedTuple

from tool_calling.data.examples import Example
from tool_calling.data.literals import to_json
from tool_calling.data.messages import check_calls, is_trained
from tool_calling.data.tools import check_tools
from tool_calling.files import digest
from tool_calling.terminal import UserError, suggest

MISSING, SHUFFLED, MASKED, UNSEEN = "missing", "shuffled", "masked", "unseen"
SHARES = {MISSING: 0.25, SHUFFLED: 0.15, MASKED: 0.3}  # of the rows of an epoch; the others stay as they are
FOLDS = 4  # into which a list is divided: each thinned list lacks one of them
LISTS = 2 * (1 + FOLDS)  # made of a list for an edition, with their own names and with others: few, as rows share them
KEPT_LISTS = 1_000  # whose lists are kept; those of a hundred thousand rows would fill the memory
REFUSAL = "Sorry, I have no tool for that."  # where the rows have no answer of their own that says so
REFUSES = re.compile(
    r"\b(?:can(?:'|’)?t|cannot|can not|unable|not able|(?:don|doesn)(?:'|’)t (?:have|support)|have no|does not support"
    r"|do not (?:have|support)|no (?:tool|function)|not (?:possible|supported|available)|unfortunately)\b",
    re.IGNORECASE,
)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


class Names(NamedTuple):
    """Other names of tools and of parameters, {old: new} each; no new one occurs in the list that they are for."""

    tools: dict[str, str]
    parameters: dict[str, str]

    def rename_text(self, text: str) -> str:
        """Return a text with the new names, where an old one stands in it that is no plain word.

        "get_weather" is a name wherever it stands; "search" may be a word like any other.
        """
        names = {old: new for old, new in (self.tools | self.parameters).items() if not is_word(old)}
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.sub(rf"(?<![\w.-])(?:{pattern})(?![\w-])", lambda found: names[found[0]], text) if names else text

    def rename_parameter(self, name: str, rules: object) -> str:
        """Return the new name of a parameter; one without a description keeps its own: nothing else says what it is."""
        return self.parameters.get(name, name) if is_described(rules) else name

    def rename_schema(self, schema: object) -> object:
        """Return a schema with the new names of its properties, at any depth."""
        if not isinstance(schema, dict):
            return schema
        rules, made = schema.get("properties", {}), {}
        new = {name: self.rename_parameter(name, inner) for name, inner in rules.items()}
        for key, value in schema.items():
            if key == "properties":
                value = {new[name]: self.rename_schema(inner) for name, inner in value.items()}
            elif key == "required":
                value = [new.get(name, name) for name in value]
            elif key in ("items", "additionalProperties"):
                value = self.rename_schema(value)
            made[key] = self.rename_text(value) if key == "description" and isinstance(value, str) else value
        return made

    def rename_value(self, value: object, schema: object) -> object:
        """Return an argument with the new names of its keys, given the old schema."""
        schema = schema if isinstance(schema, dict) else {}
        if isinstance(value, list):
            return [self.rename_value(item, schema.get("items")) for item in value]
        if not isinstance(value, dict):
            return value
        rules, other = schema.get("properties", {}), schema.get("additionalProperties")
        return {
            self.rename_parameter(name, rules.get(name)): self.rename_value(inner, rules.get(name, other))
            for name, inner in value.items()
        }

    def rename_tool(self, tool: dict) -> dict:
        """Return a tool with its new names; those of its parameters stay where its schema is more than a tree."""
        function = tool["function"]
        parameters, description = function["parameters"], function["description"]
        changed = {
            "name": self.tools.get(function["name"], function["name"]),
            "description": description and self.rename_text(description),
            "parameters": self.rename_schema(parameters) if is_tree(parameters) else parameters,
        }
        return {**tool, "function": {**function, **changed}}

    def rename_message(self, message: dict, schemas: dict[str, object]) -> dict:
        """Return a message with the new names in its calls and in its texts, but for the reply of a tool.

        Args:
            schemas: the old ones of the arguments, by the old names of tools.
        """
        texts = () if message["role"] == "tool" else ("content", "reasoning_content")
        changed = {key: self.rename_text(message[key]) for key in texts if key in message}
        if "tool_calls" in message:
            changed["tool_calls"] = [
                {**call, "function": self.rename_call(call["function"], schemas)} for call in message["tool_calls"]
            ]
        return {**message, **changed}

    def rename_call(self, call: dict, schemas: dict[str, object]) -> dict:
        """Return a call with its new names; see rename_message."""
        name, arguments = call["name"], call["arguments"]
        if name in schemas and is_tree(schemas[name]):
            arguments = self.rename_value(arguments, schemas[name])
        return {**call, "name": self.tools.get(name, name), "arguments": arguments}


class Listing(NamedTuple):
    """A list of tools made of another one."""

    tools: list[dict]
    names: Names | None = None  # its tools' and parameters', if these are not their own
    left_out: frozenset[str] = frozenset()  # of the other list, by its names
    added: bool = False  # whether it has tools of other rows

    def apply(self, example: Example) -> Example:
        """Return an example with this list, its calls under the names in it."""
        messages = example.messages
        if self.names:
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in example.tools}
            messages = [self.names.rename_message(message, schemas) for message in messages]
        return example._replace(messages=messages, tools=self.tools)


def is_described(part: object) -> bool:
    """Return whether the schema of a parameter, or a function, has a description."""
    return isinstance(part, dict) and isinstance(text := part.get("description"), str) and bool(text.strip())


def is_word(name: str) -> bool:
    """Return whether a name may also be a word of a text: "search", and neither "get_weather" nor "getWeather"."""
    return name.isalpha() and name[1:] == name[1:].lower()


def holds_object(value: object) -> bool:
    """Return whether a value is an object or a list with one."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(holds_object, value)))


def is_tree(schema: object) -> bool:
    """Return whether all names of properties in a schema stand in `properties` and `required` alone."""
    if not isinstance(schema, dict):
        return schema is None or isinstance(schema, bool)
    for key, value in schema.items():
        match key:
            case "properties":
                fine = isinstance(value, dict) and all(map(is_tree, value.values()))
            case "items" | "additionalProperties":
                fine = is_tree(value)
            case "required":
                fine = isinstance(value, list)
            case "anyOf" | "oneOf" | "allOf":  # such as a text or null
                fine = all(map(is_tree, value)) and '"properties"' not in to_json(value)
            case _:  # such as $ref, patternProperties, dependentRequired, a default that is an object
                fine = key != "$ref" and not holds_object(value)
        if not fine:
            return False
    return True


def make_names(tools: list[dict], rng: random.Random) -> Names:
    """Return made-up names for tools, and for parameters; those without a description keep their own."""
    known, taken = to_json(tools), set()

    def invent() -> str:
        while True:
            name = "_".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(2))
            if name not in known and name not in taken:
                taken.add(name)
                return name

    functions = [tool["function"] for tool in tools]
    schemas = (function["parameters"] for function in functions)
    parameters = chain.from_iterable(list_described(schema) for schema in schemas if is_tree(schema))
    return Names(
        {function["name"]: invent() for function in functions if is_described(function)},
        {name: invent() for name in dict.fromkeys(parameters)},
    )


def list_described(schema: object) -> list[str]:
    """Return the names of all properties with a description in a schema, at any depth."""
    if not isinstance(schema, dict):
        return []
    rules = schema.get("properties", {})
    found = [name for name, inner in rules.items() if is_described(inner)]
    parts = (*rules.values(), schema.get("items"), schema.get("additionalProperties"))
    return found + [name for part in parts for name in list_described(part)]


def make_listings(tools: list[dict], others: list[dict], seed: object) -> list[Listing]:
    """Return the LISTS lists made of a list of tools, every second one under made-up names.

    The first two have all its tools, and some of `others`, which rows of other lists bring; each of the other pairs
    lacks a fold of them.
    """
    rng = random.Random(f"{seed} {digest(tools)}")
    names = [tool["function"]["name"] for tool in tools]
    mixed, others = rng.sample(names, len(names)), [tool for tool in others if tool["function"]["name"] not in names]
    listings = []
    for number in range(LISTS):
        fold = number // 2 - 1
        left_out = frozenset(mixed[fold::FOLDS] if fold >= 0 else ())
        kept = [tool for tool in tools if tool["function"]["name"] not in left_out]
        added = rng.sample(others, min(len(others), 1 + len(tools) // 4)) if fold < 0 else []
        listed = rng.sample(kept + added, len(kept + added))
        new = make_names(listed, rng) if number % 2 else Names({}, {})
        listed, new = ([*map(new.rename_tool, listed)], new) if any(new) else (listed, None)
        listings.append(Listing(listed, new, left_out, bool(added)))
    return listings


def list_called(messages: list[dict]) -> set[str]:
    """Return the names of all tools that messages call, trained or not."""
    return {call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}


def find_call(example: Example) -> int | None:
    """Return the index of the first trained message with calls, None without one."""
    turns = enumerate(example.messages)
    return next((turn for turn, message in turns if "tool_calls" in message and is_trained(message)), None)


def says_name(example: Example, called: set[str]) -> bool:
    """Return whether an answer names a tool that is called by a plain word, which texts keep; see Names.rename_text."""
    keys = ("content", "reasoning_content")
    texts = " ".join(turn.get(key, "") for turn in example.messages if turn["role"] == "assistant" for key in keys)
    return any(re.search(rf"\b{re.escape(name)}\b", texts) for name in called if is_word(name))


def leave_out(examples: list[Example], names: list[str]) -> list[Example]:
    """Return the examples without the tools of these names in their lists; those that shared a list do so still."""
    lists = {id(example.tools): example.tools for example in examples}
    kept = {key: [tool for tool in tools if tool["function"]["name"] not in names] for key, tools in lists.items()}
    changed = {key: tools for key, tools in kept.items() if len(tools) < len(lists[key])}
    return [example._replace(tools=changed.get(id(example.tools), example.tools)) for example in examples]


def can_lack(example: Example, turn: int, left_out: frozenset[str], tools: list[dict]) -> bool:
    """Return whether a turn can refuse with these tools: all that it calls are left out, and none called before."""
    called, before = (list_called(part) for part in (example.messages[turn : turn + 1], example.messages[:turn]))
    lacks = bool(called) and called <= left_out and left_out.isdisjoint(before)
    return lacks and bool(tools) and "reasoning_content" not in example.messages[turn]


def refuse(example: Example, tools: list[dict], turn: int, refusal: str) -> Example:
    """Return an example up to a turn, with a list that lacks what the turn calls, and with a refusal for its answer."""
    return example._replace(messages=[*example.messages[:turn], {"role": "assistant", "content": refusal}], tools=tools)


def find_refusal(examples: list[Example]) -> tuple[str, bool]:
    """Return (the answer that says that there is no tool for a request, whether it is the rows' own).

    It is theirs if it is the same in most rows without a call that refuse something; many refusals name what they
    refuse, and would be wrong elsewhere.
    """
    texts = Counter(
        message["content"].strip()
        for example in examples
        if example.tools and not list_called(example.messages)
        for message in example.messages
        if is_trained(message) and "reasoning_content" not in message and REFUSES.search(message["content"])
    )
    [(text, count)] = texts.most_common(1) or [("", 0)]
    return (text, True) if 2 * count > texts.total() else (REFUSAL, False)


def find_held_out(examples: list[Example], wanted: str) -> list[str]:
    """Return the tools that --holdout_tools names, or a quarter of those that rows call, chosen by hash, for "auto"."""
    called = Counter(name for example in examples for name in list_called(example.messages))
    names = wanted.split(",")
    if wanted == "auto":
        names = sorted(sorted(called, key=lambda name: digest(["holdout", name]))[: max(1, len(called) // 4)])
    for name in names:
        if name not in called:
            raise UserError(f"--holdout_tools {name}: no row calls it{suggest(name, [*called])}")
    if all(list_called(example.messages) & {*names} for example in examples):
        raise UserError(f"--holdout_tools {wanted}: each row calls one of them; no row is left to train on")
    return names


def is_valid(example: Example) -> bool:
    """Return whether the schemas of its tools accept all calls of an example; see --on_invalid keep."""
    return not any(check_calls(example.messages, check_tools(example.tools)[0]))


class Changed(NamedTuple):
    """A variant of an example: its kind, the example in it, and which turn of it is trained, None for all."""

    kind: str
    example: Example
    turn: int | None


class Variants:
    """The variants of training examples: what each row is in each edition of the rows, of which an epoch takes one.

    A hash of its messages, the seed and the edition decides on a row, so neither order nor other rows matter; but tools
    of other rows may be added to its list.
    """

    def __init__(self, examples: list[Example], kinds: str, seed: int):
        self.shares = {kind: SHARES[kind] for kind in SHARES if kind in kinds.split(",")}
        self.seed, self.listings = seed, {}
        self.refusal, self.is_own = find_refusal(examples)
        lists = {id(example.tools): example.tools for example in examples}
        self.others = {tool["function"]["name"]: tool for tools in lists.values() for tool in tools}

    def list_listings(self, tools: list[dict], edition: int) -> list[Listing]:
        """Return the lists made of a list of tools for an edition; each has others, so that none can be remembered.

        Most rows share their tools, and where not, few lists are kept at a time.
        """
        key = (id(tools), edition)
        if key not in self.listings:
            if len(self.listings) == KEPT_LISTS:
                self.listings.clear()
            made = make_listings(tools, [*self.others.values()], f"{self.seed} {edition}")
            self.listings[key] = tools, made  # the tools are held, so that no other list gets their id
        return self.listings[key][1]

    def vary(self, example: Example, edition: int) -> Changed | None:
        """Return what becomes of an example in an edition, None if it stays as it is."""
        if not example.tools:
            return None
        number = int(digest([self.seed, edition, example.messages])[:16], 16)
        kind, drawn = "", number / 16**16
        for name, share in self.shares.items():
            if 0 <= drawn < share:
                kind = name
            drawn -= share
        listings = self.list_listings(example.tools, edition) if kind else []
        fitting = [made for made in listings if self.fits(kind, made, example)]
        if not fitting:
            return None
        made, turn = fitting[number % len(fitting)], find_call(example) if kind == MISSING else None
        changed = made.apply(example)
        if kind == MISSING:
            changed = refuse(changed, made.tools, turn, self.refusal)
        return Changed(kind, changed, turn) if is_valid(changed) else None

    def fits(self, kind: str, made: Listing, example: Example) -> bool:
        """Return whether a list serves a kind of variant of an example."""
        if kind == MISSING:
            named, turn = made.names is None or MASKED in self.shares, find_call(example)
            return named and not made.added and turn is not None and can_lack(example, turn, made.left_out, made.tools)
        called = list_called(example.messages)
        if (made.names is not None) != (kind == MASKED) or made.tools == example.tools:
            return False
        if made.names and says_name(example, called):
            return False
        if not called:  # with fewer tools, or more, another answer might be right
            return not made.left_out and not made.added
        return made.left_out.isdisjoint(called)
