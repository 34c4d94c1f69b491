"""Tool lists of any shape in the OpenAI shape, and each call against its own tool's schema."""

import contextlib
import copy
import difflib
import json
import re
import signal
import threading
from collections import Counter
from functools import lru_cache, reduce
from operator import getitem

import jsonschema
import referencing
import referencing.exceptions

from tool_calling.data.literals import as_list, parse_json, read_value, to_json, unpack
from tool_calling.data.rows import open_file, read_array, read_text
from tool_calling.data.schemas import to_parameters
from tool_calling.data.special_tokens import find_forbidden
from tool_calling.data.validators import (
    NullValidator,
    StrictNullValidator,
    Validator,
    describe,
    find_nulls,
    fits,
    is_plain,
    list_errors,
    to_validator,
)
from tool_calling.processes import handle_signals
from tool_calling.terminal import SHOWN_PROBLEMS, UserError, list_first, report_problems, shorten

KEPT_NULL = "null of a required argument kept"
TRIES = 1_000  # brackets of a text that may begin no JSON before the search ends: each try takes longer than the last
CHECK_SECONDS = 2  # the longest that checking a call may take
BROKEN_TOOL = re.compile(r"""\{\s*["'](?:name|type|function)["']\s*:.*""", re.DOTALL)
# Kimi's declaration, without the tools in it
EMPTY_DECLARATION = re.compile(r"<\|im_system\|>\s*tool_declare\s*<\|im_middle\|>\s*<\|im_end\|>")
SUBJECTS = {"type", "properties", "patternProperties", "additionalProperties", "$ref", "anyOf", "oneOf", "allOf"}
# Where tools say what they take: OpenAI, MCP, Anthropic, Gemini, ToolMind, smolagents, API-Bank, Cohere.
SCHEMA_KEYS = (
    "parameters inputSchema input_schema parametersJsonSchema parameters_json_schema arguments inputs "
    "input_parameters parameter_definitions args_schema args schema properties"
).split()
PLAIN_KEYS = ("parameters", "input_schema", "inputSchema")  # those of SCHEMA_KEYS by which a tool is told at once
WRAPPERS = ("function", "toolSpec")  # of a tool: OpenAI's, Bedrock's
DECLARATIONS = ("functionDeclarations", "function_declarations")  # of several tools: Gemini's
NO_ARGUMENTS = {"type": "object", "properties": {}}
NOTES = {"$schema", "$id", "$defs", "definitions", "title", "description", "required"}  # they name no property


def unwrap(parameters: object) -> object:
    """Return a tool's parameters out of JSON text, a list of named ones, or what Vercel and Bedrock put around them."""
    parameters = unpack(parameters, "the parameters of a tool are")
    if isinstance(parameters, list) and all(isinstance(part, dict) for part in parameters):
        if all(isinstance(part.get("name"), str) for part in parameters):
            return {part["name"]: {key: part[key] for key in part if key != "name"} for part in parameters}
    match parameters:
        case {"jsonSchema": {"properties": dict()}} | {"json": {"properties": dict()}} if len(parameters) == 1:
            return [*parameters.values()][0]
    return parameters


def to_served(given: dict, keys: tuple, flags: tuple, changes: Counter) -> dict:
    """Return what servers keep of an object, in their order: `keys`, null where missing, and the flags that are set."""
    served = {key: given.get(key) for key in keys}
    served |= {key: given[key] for key in flags if isinstance(given.get(key), bool)}
    changes.update(f"{key} missing -> null" for key in served if key not in given)
    changes.update(f"{key[:40]} of a tool -> dropped" for key in given if key not in served)
    if [key for key in given if key in served] != [key for key in served if key in given]:
        changes["keys of a tool -> order of servers"] += 1
    return served


def to_function(function: dict, changes: Counter) -> dict:
    """Return a function as vLLM hands it to the chat template.

    Its FunctionDefinition dumps name, description and parameters in this order, null where missing, then strict and
    defer_loading where they are set; unlike earlier releases it drops all other keys. SGLang's Function dumps the
    description before the name, and fills strict and defer_loading in: no list renders alike on both.
    """
    place = next((key for key in SCHEMA_KEYS if function.get(key) is not None), "parameters")
    if place != "parameters":
        changes[f"{place} -> parameters"] += 1
        function = {"parameters" if key == place else key: function[key] for key in function if key != "parameters"}
    parameters, required = unwrap(function.get("parameters")), function.get("required")
    if isinstance(required, list) and isinstance(parameters, dict):
        changes["required beside parameters -> inside"] += 1
        function = {key: value for key, value in function.items() if key != "required"}
        if isinstance(inner := parameters.get("required") or [], list):
            parameters = {**parameters, "required": [*inner, *(name for name in required if name not in inner)]}
    function = to_served(function, ("name", "description", "parameters"), ("strict", "defer_loading"), changes)
    return {**function, "parameters": to_parameters(parameters, changes)}


def to_tool(tool: object, changes: Counter) -> object:
    """Return one tool as {"type": "function", "function": {...}}; anything else than a tool stays as it is."""
    if not isinstance(tool, dict):
        return tool
    wrapper = next((key for key in WRAPPERS if tool.get(key) is not None), None)
    function = tool[wrapper] if wrapper else {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function, dict) or "name" not in function:
        return tool
    if not wrapper:
        changes["bare function -> tool"] += 1
        return {"type": "function", "function": to_function(function, changes)}
    if tool.get("type") != "function":
        changes["type function added"] += 1
        tool = {"type": "function", **{key: value for key, value in tool.items() if key != "type"}}
    outer = {key: tool[key] for key in ("required", "defer_loading") if tool.get(key) is not None}
    function = to_function({**function, **{k: v for k, v in outer.items() if function.get(k) is None}}, changes)
    tool = {"function" if key == wrapper else key: value for key, value in tool.items() if key != "required"}
    return to_served({**tool, "function": function}, ("type", "function"), ("defer_loading",), changes)


def list_tools(tools: object, changes: Counter) -> object:
    """Return tools as a list: out of JSON text, an object by their names (Vercel), declarations (Gemini)."""
    if isinstance(tools, str):
        tools = parse_json(tools, "tools are") if tools.strip() else []
    if not tools or not isinstance(tools, list | dict):
        return tools
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):
        tools = tools["tools"]  # as MCP lists them
    if isinstance(tools, dict) and not is_tool(tools) and all(isinstance(tool, dict) for tool in tools.values()):
        changes["tools by name -> list"] += 1
        return [{"name": name, **tool} for name, tool in tools.items()]
    found = []
    for index, tool in enumerate(as_list(tools), start=1):
        tool = unpack(tool, f"tool {index} is")
        declared = [tool[key] for key in DECLARATIONS if isinstance(tool, dict) and isinstance(tool.get(key), list)]
        changes.update(["functionDeclarations -> tools"] * len(declared))
        found += declared[0] if declared else [tool]
    return found


def to_tools(tools: object) -> tuple[object, Counter]:
    """Return (tools as servers render them, Counter of what was changed); what is not clear stays for check_tools."""
    changes: Counter = Counter()
    tools = list_tools(tools, changes)
    return [to_tool(tool, changes) for tool in tools] if isinstance(tools, list) else tools, changes


def find_bare_tools(tools: list[dict]) -> list[str]:
    """Return the names of the tools that have no description or no parameters: a model can only guess what they do."""
    functions = [tool["function"] for tool in tools]
    return [function["name"] for function in functions if not function["description"] or function["parameters"] is None]


def is_tool(value: object) -> bool:
    """Return whether a value looks like a tool of any shape; a name alone is not enough."""
    keys = {*value} if isinstance(value, dict) else set()
    described = "name" in keys and not keys.isdisjoint(("description", *PLAIN_KEYS))
    return described or not keys.isdisjoint((*WRAPPERS, *DECLARATIONS))


def find_tools(text: str) -> tuple[list[dict], str]:
    """Return (tools that are JSON in a text, the text without them): its first list of tools, or all single ones."""
    found, rest, end, failed = [], "", 0, 0
    for mark in re.finditer(r"[\[{]", text):
        if mark.start() < end:
            continue
        try:
            value, stop = read_value(text, mark.start())
        except ValueError:
            failed += 1
            if failed == TRIES:
                break
            continue
        if value and all(map(is_tool, as_list(value))):
            if isinstance(value, list):
                return value, EMPTY_DECLARATION.sub("", text[: mark.start()] + text[stop:])
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
def check_tool(text: str) -> tuple[Validator, str | None]:
    """Return (validator of the tool's arguments, its problem or None) for the JSON text of a tool."""
    function, nothing = json.loads(text)["function"], Validator({})
    schema = function.get("parameters") or NO_ARGUMENTS
    if problem := find_forbidden(text):
        return nothing, problem
    if not isinstance(description := function.get("description"), str | None):
        return nothing, f"description must be text, got {shorten(description)}"
    if not isinstance(schema, dict):
        return nothing, f"parameters must be an object, got {shorten(schema)}"
    strays = [key for key in schema if key not in NOTES]
    if strays and SUBJECTS.isdisjoint(schema):  # valid JSON Schema, by which any call would pass
        expected = '{"type": "object", "properties": {...}}'
        return nothing, f"parameters.{strays[0]} is not a keyword of JSON Schema; expected {expected}"
    try:
        validator = to_validator(schema)
        if not is_plain(validator.schema):
            validator.check_schema(validator.schema, format_checker=validator.FORMAT_CHECKER)
        return validator, None
    except jsonschema.SchemaError as error:
        path = ".".join(["parameters", *map(str, error.absolute_path)])
        return nothing, f"{path} is not valid JSON Schema: {error.message[:200]}"
    except Exception as error:  # a schema is a small program in the data: it can break the library in many ways
        return nothing, f"parameters cannot be used as JSON Schema: {error}"[:300]


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
        taken = "an earlier tool has the same name" if name in validators else None
        validators[name], problem = check_tool(to_json(tool))
        problems += [f"tool {index} {shorten(name)}: {found}" for found in (taken, problem) if found]
    return validators, problems


@contextlib.contextmanager
def limit_time(seconds: float):
    """Raise a TimeoutError inside the block after so long: a `pattern` in the data can keep Python busy for years."""

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
    """Return the problems of a call by its tool's schema; the problem of one that is too slow stays in `validators`."""
    if name not in validators:
        close = difflib.get_close_matches(name, validators, n=1)
        known = list_first(validators, SHOWN_PROBLEMS) or "none"
        return ["the row has no such tool; " + (f'did you mean "{close[0]}"?' if close else f"tools: {known}")]
    if isinstance(validators[name], str):
        return [validators[name]]
    try:
        if fits(arguments, validators[name].schema):
            return []
        with limit_time(CHECK_SECONDS):
            return [*map(describe, list_errors(validators[name], arguments))]
    except TimeoutError:
        advice = "simplify its patterns or alternatives"
        validators[name] = f"its tool's schema takes over {CHECK_SECONDS} s to apply; {advice}"
        return [validators[name]]
    except referencing.exceptions.Unresolvable as error:
        return [f"its tool's schema refers to {error.ref}, which is not inside that schema"]
    except Exception as error:  # as in check_tool
        return [f"its tool's schema cannot be applied: {type(error).__name__}: {error}"[:300]]


@lru_cache(maxsize=2_000)
def build_null_validators(text: str) -> tuple[NullValidator, StrictNullValidator]:
    """Return the validators that refuse nulls but of required arguments, and all nulls, for a schema's JSON text."""
    schema = json.loads(text) or NO_ARGUMENTS
    return to_validator(schema, NullValidator), to_validator(schema, StrictNullValidator)


def holds_null(value: object) -> bool:
    """Return whether a value is or contains null."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(holds_null, inner))


def settle_arguments(arguments: dict, schema: object, changes: Counter) -> dict:
    """Return a call's arguments without the nulls that the schema of its tool has no place for, counted.

    Models write null for "not given", and tables fill objects up with the keys of others. A null goes where the schema
    refuses it or does not know its key. The null of a required argument stays, and check_call accepts it.
    """
    if not holds_null(arguments):
        return arguments
    settled, counts = copy.deepcopy(arguments), Counter()
    try:
        with limit_time(CHECK_SECONDS):
            validator, strict = build_null_validators(to_json(schema))
            while found := find_nulls(list_errors(validator, settled)):  # without one, more may be known of the others
                for (*path, name), known in found.items():
                    del reduce(getitem, path, settled)[name]
                    counts["null of an optional argument left out" if known else "null of no argument dropped"] += 1
            kept = find_nulls(list_errors(strict, settled))
    except Exception:  # as in check_tool; check_call says what is wrong
        return arguments
    counts[KEPT_NULL] += len(kept)
    changes.update(+counts)
    return settled


def read_tools(path: str) -> tuple[list[dict], Counter]:
    """Return (tools of a JSON file, Counter of what to_tools changed); a broken file or tool is a UserError."""
    with open_file(path) as file:
        text = read_text(file)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        raise UserError(f'{path}: expected a JSON array of tools, [{{"type": "function", "function": {{...}}}}, ...]')
    found = [*read_array(path, text)]
    sources, elements = [source for source, _ in found], [element for _, element in found]
    try:
        tools, changes = to_tools(elements[0] if start == "{" and len(elements) == 1 else elements)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None
    sources = sources if len(sources) == len(tools) else [path] * len(tools)  # one element may hold several tools
    problems = check_tools(tools)[1]
    located = [(sources[int(re.match(r"tool (\d+)", problem)[1]) - 1], problem) for problem in problems]
    report_problems(located, "error", len(tools), "tool")
    return tools, changes
