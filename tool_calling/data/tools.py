"""Tool lists of any shape in the OpenAI shape, and each call against its own tool's schema."""

import contextlib
import difflib
import json
import re
import signal
import threading
from collections import Counter
from functools import lru_cache

import jsonschema
import referencing
import referencing.exceptions

from tool_calling.data.literals import as_list, parse_json, read_value, to_json, unpack
from tool_calling.data.rows import open_file, read_array, read_text
from tool_calling.data.schemas import describe, drop_nulls, to_parameters, to_strict
from tool_calling.data.special_tokens import find_forbidden
from tool_calling.processes import handle_signals
from tool_calling.terminal import SHOWN_PROBLEMS, UserError, list_first, report_problems, shorten

CHECK_SECONDS = 2  # the longest that checking a call may take
BROKEN_TOOL = re.compile(r"""\{\s*["'](?:name|type|function)["']\s*:.*""", re.DOTALL)
SUBJECTS = {"type", "properties", "patternProperties", "additionalProperties", "$ref", "anyOf", "oneOf", "allOf"}
NOTES = {"$schema", "$id", "$defs", "definitions", "title", "description", "required"}  # they name no property


def to_tool(tool: object, changes: Counter) -> object:
    """Return one tool as {"type": "function", "function": {...}}; anything else than a tool stays as it is."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
        return tool
    rest = {key: value for key, value in tool.items() if key != "type"}
    if "function" not in tool:
        if "name" not in tool:
            return tool
        changes["bare function -> tool"] += 1
        tool = {"type": "function", "function": rest}
    elif tool.get("type") is None:
        changes["type function added"] += 1
        tool = {"type": "function", **rest}
    function = drop_nulls(tool["function"], changes)
    for key in ("inputSchema", "input_schema"):  # as MCP and Anthropic name them
        if key in function and "parameters" not in function:
            changes[f"{key} -> parameters"] += 1
            function["parameters"] = function.pop(key)
    if "parameters" in function:
        function["parameters"] = to_parameters(function["parameters"], changes)
    return {**tool, "function": function}


def to_tools(tools: object) -> tuple[object, Counter]:
    """Return (tools in the OpenAI shape, Counter of what was changed); what is not clear stays for check_tools."""
    changes: Counter = Counter()
    if isinstance(tools, str):
        tools = parse_json(tools, "tools are") if tools.strip() else []
    if isinstance(tools, list):
        tools = [to_tool(unpack(tool, f"tool {index} is"), changes) for index, tool in enumerate(tools, start=1)]
    return tools, changes


def is_tool(value: object) -> bool:
    """Return whether a value looks like a tool, in the OpenAI shape or bare; a name alone may be anything's."""
    keys = value.keys() if isinstance(value, dict) else {}
    return "function" in keys or ("name" in keys and not keys.isdisjoint(("parameters", "description")))


def find_tools(text: str) -> tuple[list[dict], str]:
    """Return (tools that are JSON in a text, the text without them): its first list of tools, or all single ones."""
    found, rest, end = [], "", 0
    for mark in re.finditer(r"[\[{]", text):
        if mark.start() < end:
            continue
        try:
            value, stop = read_value(text, mark.start())
        except ValueError:
            continue
        if value and all(map(is_tool, as_list(value))):
            if isinstance(value, list):
                return value, text[: mark.start()] + text[stop:]
            found.append(value)
            rest, end = rest + text[end : mark.start()], stop
    return found, rest + text[end:]


def take_tools(text: str) -> tuple[list[dict], str]:
    """Return what find_tools does; ValueError if one of several tools cannot be read."""
    found, rest = find_tools(text)
    if found and (broken := BROKEN_TOOL.search(rest)):
        raise ValueError(f"one of the tools is not JSON: {shorten(broken[0])}")
    return found, rest


@lru_cache(maxsize=20_000)  # rows share tools: checking one takes longer than checking a row's calls
def check_tool(text: str) -> tuple[jsonschema.Draft202012Validator, str | None]:
    """Return (validator of the tool's arguments, its problem or None) for the JSON text of a tool."""
    validator = jsonschema.Draft202012Validator
    schema = json.loads(text)["function"].get("parameters") or {"type": "object", "properties": {}}
    if problem := find_forbidden(text):
        return validator({}), problem
    if not isinstance(schema, dict):
        return validator({}), f"parameters must be an object, got {shorten(schema)}"
    strays = [key for key in schema if key not in NOTES]
    if strays and SUBJECTS.isdisjoint(schema):  # valid JSON Schema, by which any call would pass
        expected = '{"type": "object", "properties": {...}}'
        return validator({}), f"parameters.{strays[0]} is not a keyword of JSON Schema; expected {expected}"
    try:
        validator.check_schema(schema, format_checker=validator.FORMAT_CHECKER)
        # An empty registry: a $ref to elsewhere is a problem, never a download.
        return validator(to_strict(schema), registry=referencing.Registry()), None
    except jsonschema.SchemaError as error:
        path = ".".join(["parameters", *map(str, error.absolute_path)])
        return validator({}), f"{path} is not valid JSON Schema: {error.message[:200]}"
    except Exception as error:  # a schema is a small program in the data: it can break the library in many ways
        return validator({}), f"parameters cannot be used as JSON Schema: {error}"[:300]


def check_tools(tools: object) -> tuple[dict, list[str]]:
    """Return ({tool name: validator of its arguments}, problems) for a list of tools in the OpenAI shape."""
    if not isinstance(tools, list):
        return {}, [f"tools must be a list, got {shorten(tools)}"]
    validators, problems = {}, []
    for index, tool in enumerate(tools, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            expected = '{"type": "function", "function": {"name": ...}}'
            problems.append(f"tool {index}: expected {expected}, got {shorten(tool)}")
            continue
        taken = ["an earlier tool has the same name"] if name in validators else []
        validators[name], problem = check_tool(to_json(tool))
        problems += [f"tool {index} {shorten(name)}: {found}" for found in (*taken, problem) if found]
    return validators, problems


@contextlib.contextmanager
def limit_time(seconds: float):
    """Raise a TimeoutError in what computes for longer: a `pattern` in the data can keep Python busy for years."""

    def stop(number, frame):
        raise TimeoutError

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield  # as on Windows: there is no such timer
        return
    with handle_signals(stop, (signal.SIGVTALRM,)):  # of its own time: other programs may keep the processor busy
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def check_call(name: str, arguments: dict, validators: dict) -> list[str]:
    """Return the problems of a call by the JSON Schema of its own tool.

    A schema that took too long is not tried again: its place in `validators` then holds the problem.
    """
    if name not in validators:
        close = difflib.get_close_matches(name, validators, n=1)
        known = list_first(validators, SHOWN_PROBLEMS) or "none"
        return ["the row has no such tool; " + (f'did you mean "{close[0]}"?' if close else f"tools: {known}")]
    if isinstance(validators[name], str):
        return [validators[name]]
    try:
        with limit_time(CHECK_SECONDS):
            errors = sorted(validators[name].iter_errors(arguments), key=lambda error: error.json_path)
    except TimeoutError:
        advice = "simplify its patterns or alternatives"
        validators[name] = f"its tool's schema takes over {CHECK_SECONDS} s to apply; {advice}"
        return [validators[name]]
    except referencing.exceptions.Unresolvable as error:
        return [f"its tool's schema refers to {error.ref}, which is not inside that schema"]
    except Exception as error:  # as in check_tool
        return [f"its tool's schema cannot be applied: {type(error).__name__}: {error}"[:300]]
    # A part that fails inside a value lets none of its properties pass: these are then not unknown.
    failed = [error.json_path for error in errors if error.validator != "unevaluatedProperties"]
    return [
        describe(error)
        for error in errors
        if error.validator != "unevaluatedProperties" or not any(path.startswith(error.json_path) for path in failed)
    ]


def read_tools(path: str) -> tuple[list[dict], Counter]:
    """Return (tools of a JSON file, Counter of what to_tools changed); a broken file or tool is a UserError."""
    with open_file(path) as file:
        text = read_text(file)
    if not text.lstrip().startswith("["):
        raise UserError(f'{path}: expected a JSON array of tools, [{{"type": "function", "function": {{...}}}}, ...]')
    elements = [*read_array(path, text)]
    try:
        tools, changes = to_tools([tool for _, tool in elements])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None
    problems = check_tools(tools)[1]
    located = [(elements[int(re.match(r"tool (\d+)", problem)[1]) - 1][0], problem) for problem in problems]
    report_problems(located, "error", len(tools), "tool")
    return tools, changes
