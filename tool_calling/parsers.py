"""The calls in an answer, read as a server's tool parser reads them; PARSERS is the one place to add one.

Unlike data/syntaxes.py, which reads what people write into data, these accept what vLLM accepts and nothing else: the
calls that a user of the served model gets. Each takes (answer, tools) and returns [{"name", "arguments"}, ...], []
for an answer without calls; ValueError for one that starts a call and breaks it.
"""

import ast
import json
import keyword
import math
import re

from tool_calling.data.literals import as_list, parse_python

FUNCTION = re.compile(r"<function=([^>]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
PYTHON_LIST = re.compile(r"\[\s*[A-Za-z_][\w.]*\(")
RESERVED = re.compile(rf"\b({'|'.join(keyword.kwlist)})(?=\s*=)")  # from=1 is no Python
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
MARK = "ꙮ"  # makes a reserved word a name, and is in no data
GEMMA_CALL = re.compile(r"<\|tool_call>\s*call:([^{]*)(\{.*?\})\s*(?:<tool_call\|>|\Z)", re.DOTALL)
GEMMA_TEXT = re.compile(r'<\|"\|>(.*?)<\|"\|>|([^\s{}\[\],:][^{}\[\],:]*)', re.DOTALL)
FUNCTION_GEMMA_CALL = re.compile(r"<start_function_call>call:(\w+)\{(.*?)(?:\}<end_function_call>|\Z)", re.DOTALL)
HARMONY_CALL = re.compile(r"to=functions\.([^\s<]+).*?<\|message\|>(.*?)(?:<\|call\|>|\Z)", re.DOTALL)
WORDS = {"null": None, "true": True, "false": False}
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def parse_hermes(text: str, tools: list[dict]) -> list[dict]:
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>; the last one may be cut off behind its JSON."""
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", text, re.DOTALL)
    return [json.loads(closed or unclosed) for closed, unclosed in blocks]


def parse_llama_json(text: str, tools: list[dict]) -> list[dict]:
    """{"name": "f", "parameters": {...}} as the whole answer, or several separated by ";"."""
    rest, calls = text.strip().removeprefix("<|python_tag|>").lstrip(), []
    if not rest.startswith("{"):
        return []
    while rest:
        try:
            call, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            if '"name"' in text:
                raise
            return []
        if not isinstance(call, dict) or "name" not in call or not call.keys() & {"parameters", "arguments"}:
            return []
        calls.append({"name": call["name"], "arguments": call.get("arguments", call.get("parameters"))})
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return calls


def list_types(schema: dict) -> set[str]:
    """Return the JSON types that a parameter's schema allows, {"string"} if it names none."""
    types = {kind for kind in as_list(schema.get("type")) if isinstance(kind, str)}
    types |= {JSON_TYPES.get(type(value), "null") for value in as_list(schema.get("enum", []))}
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in as_list(schema.get(key, []))]
    return types.union(*(list_types(part) for part in parts if isinstance(part, dict))) or {"string"}


def to_number(text: str) -> float:
    """Return a finite number, an int if it is whole."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("JSON has no such number")
    return int(value) if value == int(value) else value


READERS = {  # of a text by type, in the order in which servers try them
    "null": lambda text: {"null": None}[text.lower()],
    "integer": int,
    "number": to_number,
    "boolean": lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower().strip()],
    "object": json.loads,
    "array": json.loads,
    "string": str,
}


def to_typed(value: object, schema: object) -> object:
    """Return a value whose texts are read by the types of its schema; without one, texts stay texts."""
    schema = schema if isinstance(schema, dict) else {"type": "string"}
    if isinstance(value, dict):
        rules = schema.get("properties") or {}
        return {key: to_typed(item, rules.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [to_typed(item, schema.get("items")) for item in value]
    types = list_types(schema)
    for read in [read for kind, read in READERS.items() if kind in types] + [json.loads]:
        try:
            return read(value)
        except (ValueError, KeyError):
            continue
    return value


def type_arguments(name: str, arguments: dict, tools: list[dict]) -> dict:
    """Return the call of a tool whose values are texts, or hold some, typed by its schema."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    return {"name": name, "arguments": to_typed(arguments, schemas.get(name))}


def parse_qwen_xml(text: str, tools: list[dict]) -> list[dict]:
    """<tool_call><function=f><parameter=k>v</parameter></function></tool_call>, values typed by the tool's schema."""
    calls = []
    for name, inside in FUNCTION.findall(text):
        texts = {key: value.removeprefix("\n").removesuffix("\n") for key, value in PARAMETER.findall(inside)}
        calls.append(type_arguments(name.strip(), texts, tools))
    if FUNCTION.sub("", text).count("<tool_call>") > len(calls):
        raise ValueError("a <tool_call> without a <function=...>")
    return calls


def to_literal(node: ast.expr) -> object:
    """Return the value of a node; ValueError for all but literals, so for negative numbers, as in vLLM."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
        case ast.List():
            return [to_literal(item) for item in node.elts]
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
            return {key.value: to_literal(value) for key, value in zip(node.keys, node.values)}
        case _:
            raise ValueError("an argument must be a literal without a sign")


def read_python_calls(text: str) -> list[dict]:
    """Return the calls of a Python list of calls with keywords; ValueError if it is none."""
    listed, calls = parse_python(text), []
    for call in getattr(listed, "elts", [None]):
        if not isinstance(call, ast.Call) or not all(pair.arg for pair in call.keywords):
            raise ValueError("expected a list of calls like f(key=value)")
        arguments = {pair.arg: to_literal(pair.value) for pair in call.keywords}
        calls.append({"name": ast.unparse(call.func), "arguments": arguments})
    try:
        return json.loads(json.dumps(calls))
    except TypeError as error:  # b"x"
        raise ValueError(str(error)) from None


def parse_pythonic(text: str, tools: list[dict]) -> list[dict]:
    """[f(x=1), g()] as the whole answer."""
    return read_python_calls(text) if PYTHON_LIST.match(text) else []


def parse_llama4_pythonic(text: str, tools: list[dict]) -> list[dict]:
    """<|python_start|>[f(x=1), g()]<|python_end|>, or what parse_pythonic reads."""
    if text.startswith("<|python_start|>"):
        text = text.removeprefix("<|python_start|>").replace("<|python_end|>", "")
    return parse_pythonic(text, tools)


def parse_lfm2(text: str, tools: list[dict]) -> list[dict]:
    """<|tool_call_start|>[f(x=1), g()]<|tool_call_end|>, texts around it.

    Keys may be reserved words of Python, and texts may have several lines.
    """
    _, started, rest = text.partition("<|tool_call_start|>")
    if not started:
        return []
    code = QUOTED.sub(lambda text: text[0].replace("\n", "\\n"), rest.partition("<|tool_call_end|>")[0].strip())
    try:
        return read_python_calls(code)
    except ValueError:
        calls = read_python_calls(RESERVED.sub(rf"\1{MARK}", code))
        return json.loads(json.dumps(calls, ensure_ascii=False).replace(MARK, ""))


def parse_olmo3(text: str, tools: list[dict]) -> list[dict]:
    """<function_calls>, then a call f(x=1) on each line."""
    inside = re.search(r"<function_calls>(.*?)</function_calls>", text, re.DOTALL)
    lines = (inside[1] if inside else text).strip().splitlines()
    return parse_pythonic(f"[{', '.join(filter(None, map(str.strip, lines)))}]", tools)


def parse_functiongemma(text: str, tools: list[dict]) -> list[dict]:
    """<start_function_call>call:f{k:<escape>v<escape>}<end_function_call>; a value is JSON if it can be.

    What stands outside of <escape> is not read.
    """
    calls = []
    for name, inside in FUNCTION_GEMMA_CALL.findall(text):
        arguments = dict(re.findall(r"(\w+):<escape>(.*?)<escape>", inside, re.DOTALL))
        for key, value in arguments.items():
            try:
                arguments[key] = json.loads(value)
            except ValueError:
                continue
        calls.append({"name": name, "arguments": arguments})
    if text.count("<start_function_call>") > len(calls):
        raise ValueError("a <start_function_call> without call:name{...}")
    return calls


def parse_gemma4(text: str, tools: list[dict]) -> list[dict]:
    """<|tool_call>call:f{k:<|"|>v<|"|>,n:1}<tool_call|>, values typed by the tool's schema."""
    calls = []
    for name, inside in GEMMA_CALL.findall(text):
        quoted = GEMMA_TEXT.sub(lambda part: json.dumps(part[2].strip() if part[1] is None else part[1]), inside)
        calls.append(type_arguments(name.strip(), json.loads(quoted), tools))
    if text.count("<|tool_call>") > len(calls):
        raise ValueError("a <|tool_call> without call:name{...}")
    return calls


def parse_mistral(text: str, tools: list[dict]) -> list[dict]:
    """[TOOL_CALLS] [{"name": "f", "arguments": {...}}], or [TOOL_CALLS]f[ARGS]{...} for each call."""
    calls = []
    for part in text.split("[TOOL_CALLS]")[1:]:
        if part.lstrip().startswith("["):
            found, _ = json.JSONDecoder().raw_decode(part.lstrip())
            if not all(isinstance(call, dict) and "name" in call for call in found):
                raise ValueError("a call without a name")
            calls += [{"name": call["name"], "arguments": call.get("arguments", {})} for call in found]
        else:
            name, brace, arguments = part.partition("{")
            calls.append({"name": name.replace("[ARGS]", ""), "arguments": json.loads(brace + arguments)})
    return calls


def parse_harmony(text: str, tools: list[dict]) -> list[dict]:
    """to=functions.f<|channel|>commentary json<|message|>{...}<|call|>"""
    return [{"name": name, "arguments": json.loads(inside)} for name, inside in HARMONY_CALL.findall(text)]


PARSERS = {  # by the names that vLLM's --tool-call-parser has; of two that read a template's calls, the first is named
    "hermes": parse_hermes,
    "llama3_json": parse_llama_json,
    "qwen3_coder": parse_qwen_xml,
    "pythonic": parse_pythonic,
    "llama4_pythonic": parse_llama4_pythonic,
    "lfm2": parse_lfm2,
    "olmo3": parse_olmo3,
    "functiongemma": parse_functiongemma,
    "gemma4": parse_gemma4,
    "mistral": parse_mistral,
    "openai": parse_harmony,
}


def parse_calls(text: str, parser: str = "hermes", tools: list[dict] | tuple = ()) -> list[dict]:
    """Return the calls in an answer as the server's parser of that name reads them; ValueError if one is broken."""
    return PARSERS[parser](text, tools)
