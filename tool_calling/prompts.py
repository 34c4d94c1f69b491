"""The prompt that a server renders, and the answer that its chat template writes after it."""

import contextlib
import json
import re
import time
from functools import partial

import jinja2

from tool_calling.data.examples import Example
from tool_calling.data.special_tokens import SPECIAL_TOKEN
from tool_calling.parsers import PARSERS, parse_calls
from tool_calling.terminal import UserError, shorten, warn

THOUGHTS = (("<think>", "</think>"), ("<|channel>", "<channel|>"))  # marks of reasoning; the latter are Gemma 4's
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # of a turn served without thinking
DEFAULT = "{{% if enable_thinking is not defined %}}{{% set enable_thinking = {} %}}{{% endif %}}\n"
HIDDEN = "{% set tools = none %}\n"  # before a chat template: it writes what it does for a request without tools
# What Ollama keeps of the schema of a tool's arguments and of one argument, in the order in which it writes them.
ARGUMENTS_KEYS = ("type", "$defs", "items", "required", "properties")
ARGUMENT_KEYS = ("anyOf", "type", "items", "description", "enum", "properties")
ESCAPED = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}  # as Go writes them in JSON
NUMBERS = {"type": "object", "properties": {"numbers": {"type": "array", "items": {"type": "number"}}}}
PROBE_RULES = {"probe": {"type": "string"}, "count": {"type": "integer"}, "sure": {"type": "boolean"}, "more": NUMBERS}
PROBE_SCHEMA = {"type": "object", "properties": PROBE_RULES}
PROBE_FUNCTION = {"name": "probe_tool", "description": "Probe.", "parameters": PROBE_SCHEMA}
PROBE_TOOL = {"type": "function", "function": PROBE_FUNCTION}
PROBE_ARGUMENTS = {"probe": "value", "count": 3, "sure": True, "more": {"numbers": [1, 0.5]}}
PROBE_CALLED = {"name": "probe_tool", "arguments": PROBE_ARGUMENTS}
PROBE_CALL = {"type": "function", "id": "probe0001", "function": PROBE_CALLED}
PROBE = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "content": "probe reply", "name": "probe_tool", "tool_call_id": "probe0001"},
]


def take_answer(text: str, reference: str) -> str:
    """Return a text without the reasoning before it, as reasoning parsers of servers do.

    Reasoning that never ends leaves no answer. `reference` is the supervised text for the same prompt: if it closes a
    think block that it does not open, the prompt has opened it.
    """
    for start, end in THOUGHTS:
        before, closed, _ = reference.partition(end)
        if (closed and start not in before) or text.lstrip().startswith(start):
            return text.partition(end)[2].lstrip()
    return text


def render_text(tokenizer, messages: list[dict], date: str | None = None, **options) -> str:
    """Return the text that the chat template makes of messages, with `date` (YYYY-MM-DD) as today's.

    ValueError if the template refuses them.
    """
    if date:
        options["strftime_now"] = lambda form: time.strftime(form, time.strptime(date, "%Y-%m-%d"))
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # the last two: Python's own, inside the template
        raise ValueError(f"the chat template refuses it: {error}") from None


def needs_switch(tokenizer, thinks: bool) -> bool:
    """Return whether the chat template must be told that the model thinks, or does not, because its default differs."""
    render = partial(render_text, tokenizer, PROBE[:1], add_generation_prompt=True)
    return render() != render(enable_thinking=thinks)


def set_default(tokenizer, thinks: bool) -> None:
    """Let the chat template think by default if the model does: not all clients say so.

    A line before it does that where it must, in the place of one from an earlier run. What a client says still counts.
    """
    if isinstance(tokenizer.chat_template, str):  # or there are several, by name
        lines = {value: DEFAULT.format(str(value).lower()) for value in (True, False)}
        own = tokenizer.chat_template = tokenizer.chat_template.replace(lines[True], "").replace(lines[False], "")
        if needs_switch(tokenizer, thinks):
            tokenizer.chat_template = lines[thinks] + own


def hide_tools(tokenizer, hidden: bool) -> None:
    """Let the chat template leave out the tools of a request, or write them, whatever an earlier run chose.

    A line before it does that. It is saved with the template, so servers render the prompts of training from the same
    requests, whose tools they read calls by.
    """
    if isinstance(tokenizer.chat_template, str):
        if HIDDEN in tokenizer.chat_template and not hidden:
            found = "was trained on prompts without tools, and now gets them; to go on as before, add"
            warn(f"{tokenizer.name_or_path}: {found} --tools_in_prompt none")
        tokenizer.chat_template = HIDDEN * hidden + tokenizer.chat_template.replace(HIDDEN, "")
    elif hidden:
        advice = "has several chat templates, by name; give it one with --chat_template"
        raise UserError(f"--tools_in_prompt none: {tokenizer.name_or_path}: {advice}")


def give_ids(messages: list[dict]) -> list[dict]:
    """Return the messages with ids of all calls and replies, as clients send them: the data's own, or new ones.

    By the ids templates find which tool a reply is of, and Mistral's wants nine letters or digits.
    """
    given, waiting, count = [], [], 0
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [{"id": f"call{number:05}", **call} for number, call in enumerate(calls, start=count)]
            message, waiting, count = (
                {**message, "tool_calls": calls},
                [call["id"] for call in calls],
                count + len(calls),
            )
        elif message["role"] == "tool" and waiting:
            known = message.get("tool_call_id") in waiting
            message = {**message, "tool_call_id": message["tool_call_id"] if known else waiting[0]}
            waiting.remove(message["tool_call_id"])
        given.append(message)
    return given


def prune(schema: dict | bool, keys: tuple[str, ...] = ARGUMENT_KEYS) -> dict | bool:
    """Return a JSON Schema with these keys alone, in this order, and without empty texts and lists."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: schema[key] for key in keys if schema.get(key) not in (None, "", [])}
    if "properties" in kept:
        kept["properties"] = {name: prune(rules) for name, rules in kept["properties"].items()}
    if "anyOf" in kept:
        kept["anyOf"] = [*map(prune, kept["anyOf"])]
    return kept


def write_as_ollama(prompt: str, tools: list[dict]) -> str:
    """Return a rendered prompt with its tools as Ollama writes them; ValueError if not each is JSON on one line.

    Ollama writes no spaces, and its own keys in its own order; around the function stands what Qwen's template has.
    """
    for tool in tools:
        function = prune(tool["function"], ("name", "description"))
        function["parameters"] = prune(tool["function"].get("parameters", {}), ARGUMENTS_KEYS)
        compact = json.dumps(function, ensure_ascii=False, separators=(",", ":")).translate(ESCAPED)
        before, found, after = prompt.partition(json.dumps(tool, ensure_ascii=False))
        if not found:
            raise ValueError("the chat template does not write each tool as JSON on a line of its own")
        prompt = f'{before}{{"type": "function", "function": {compact}}}{after}'
    return prompt


def render_turn(tokenizer, example: Example, turn: int, date: str | None = None) -> tuple[str, str, str]:
    """Return the texts (prompt, completion, end token) of the assistant turn `example.messages[turn]`.

    A template may render one turn differently in the middle of a conversation and at its end: Qwen3 drops the think
    block of a turn that a tool reply follows. So the prompt is what a server renders before the turn, and the
    completion is what the template adds when the turn is the last message. ValueError if the two do not fit together.
    """
    message, name = example.messages[turn], f"message {turn + 1}"
    thinks = "reasoning_content" in message
    render = partial(render_text, tokenizer, date=date, tools=example.tools or None, enable_thinking=thinks)
    try:
        prompt = render(example.messages[:turn], add_generation_prompt=True)
        whole = render(example.messages[: turn + 1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    # Before the first user message Qwen3's template writes no empty think block into the answer, but into the prompt.
    start = len(prompt if whole.startswith(prompt) else prompt.removesuffix(EMPTY_THOUGHT))
    if whole[:start] != prompt[:start]:
        raise ValueError(f"{name}: the chat template does not render this answer after its serving prompt")
    end_token = find_turn_end(tokenizer, whole[start:], "tool_calls" in message)
    if end_token is None:
        raise ValueError(f"{name}: the chat template does not end this answer with {tokenizer.eos_token}")
    completion = whole[start : whole.rfind(end_token)]
    for key in ("reasoning_content", "content"):
        if message.get(key, "").strip() not in completion:
            raise ValueError(f"{name}: the chat template leaves out its {key}; remove it, or choose another model")
    return prompt, completion, end_token


def find_turn_end(tokenizer, text: str, calls: bool) -> str | None:
    """Return the token that ends the answer in a rendered text, or None.

    It is the one that ends all answers. One with `calls` may end the text with another, at which servers stop as well:
    FunctionGemma's <start_function_response>, Gemma 4's <|tool_response>, gpt-oss's <|call|>.
    """
    if tokenizer.eos_token in text:
        return tokenizer.eos_token
    last = re.search(r"(<[^<>/\s]+>)\s*\Z", text) if calls else None
    known = last and tokenizer.convert_tokens_to_ids(last[1]) not in (None, tokenizer.unk_token_id)
    return last[1] if known else None


def check_calls(completion: str, example: Example, turn: int, parser: str) -> None:
    """Raise a ValueError if the parser does not read exactly the calls of a turn back from its completion."""
    message, name = example.messages[turn], f"message {turn + 1}"
    try:
        calls = parse_calls(take_answer(completion, completion), parser, example.tools)
    except ValueError:
        raise ValueError(f"{name}: would be read as a broken call: {shorten(completion)}") from None
    if calls != [call["function"] for call in message.get("tool_calls", [])]:
        raise ValueError(f"{name}: its calls do not survive rendering and parsing: {shorten(completion)}")


def find_date(tokenizer) -> str | None:
    """Return today's date if the chat template writes it into prompts, as Llama's does, else None."""
    texts = {render_text(tokenizer, PROBE[:1], date) for date in ("2001-01-01", "2002-02-02")}
    return time.strftime("%Y-%m-%d") if len(texts) > 1 else None


def find_end_token(tokenizer) -> str | None:
    """Return the token with which the chat template ends an answer, or None."""
    try:
        text = render_text(tokenizer, [PROBE[0], {"role": "assistant", "content": "probe answer"}])
    except ValueError:
        return None
    _, found, tail = text.rpartition("probe answer")
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in tail]
    return min(tokens, key=tail.find, default=None) if found else None


def find_special_tokens(tokenizer) -> re.Pattern | None:
    """Return a pattern of the tokenizer's own special tokens beyond those known to all, or None."""
    added, template = tokenizer.added_tokens_decoder.values(), str(tokenizer.chat_template)
    tokens = [str(token) for token in added if token.special or str(token) in template]
    tokens = [token for token in tokens if token.strip() and not SPECIAL_TOKEN.search(token)]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def find_call_end(tokenizer) -> str | None:
    """Return the token with which the chat template ends an answer with calls, or None if it renders none."""
    try:
        return render_turn(tokenizer, Example("", PROBE[:2], [PROBE_TOOL]), 1)[2]
    except ValueError:
        return None


def find_parser(tokenizer) -> str:
    """Return which of PARSERS reads the calls that the chat template writes; ValueError if none does.

    If texts are all that one reads back, a warning says so; the rows with other values are then problems.
    """
    seen = []
    for arguments in (PROBE_ARGUMENTS, {"probe": "value"}):
        call = {**PROBE_CALL, "function": {**PROBE_CALLED, "arguments": arguments}}
        example = Example("", [PROBE[0], {**PROBE[1], "tool_calls": [call]}], [PROBE_TOOL])
        seen.append(render_turn(tokenizer, example, 1)[1])
        for parser in PARSERS:
            with contextlib.suppress(ValueError):
                check_calls(seen[-1], example, 1, parser)
                if len(seen) > 1:
                    lost = "no numbers, truth values, lists or objects"
                    warn(
                        f"{tokenizer.name_or_path}: vLLM's parser {parser} reads only texts back from its calls, {lost}"
                    )
                return parser
    raise ValueError(f"the chat template writes calls in a way that cannot be read back: {shorten(seen[0], 160)}")


def check_template(tokenizer, examples: list[Example]) -> str:
    """Return the parser for the chat template's calls; UserError if the template leaves out what the rows use."""
    if not any(example.tools for example in examples):
        return next(iter(PARSERS))
    replies = any(message["role"] == "tool" for example in examples for message in example.messages)
    try:
        shown = "probe_tool" in render_text(tokenizer, PROBE[:1], tools=[PROBE_TOOL])
        if not shown and HIDDEN not in tokenizer.chat_template:
            raise ValueError("the chat template leaves out the tools")
        if replies and "probe reply" not in render_text(tokenizer, PROBE, tools=[PROBE_TOOL]):
            raise ValueError("the chat template leaves out the replies of tools")
        return find_parser(tokenizer)
    except ValueError as error:
        reason = str(error).removeprefix("message 2: ")
        expected = f"expected a chat template with tools whose calls one of vLLM's parsers reads: {', '.join(PARSERS)}"
        expected += "; --chat_template gives a base another one"
        raise UserError(f"{tokenizer.name_or_path}: {reason}; {expected}") from None
