"""Schemas of arguments: foreign types in, JSON Schema out; its dialects stay as they are, as servers render them."""

import ast
import re
from collections import Counter
from collections.abc import Callable

from tool_calling.data.literals import as_list, parse_python

# fmt: off
TYPES = {  # what Python, Java, TypeScript, databases and Gemini call a type, in lower case: JSON Schema's name
    name: kind
    for kind, names in {
        "string": "str string text char character varchar bytes binary date datetime date-time time "
        "localdate localdatetime uuid url uri email",
        "integer": "int integer long short byte bigint biginteger int8 int16 int32 int64 uint uint8 uint32 uint64",
        "number": "float double number decimal bigdecimal numeric real float32 float64",
        "boolean": "bool boolean",
        "object": "dict object map hashmap hashtable linkedhashmap treemap record mapping struct",
        "array": "list tuple array arraylist linkedlist queue deque stack vector sequence iterable collection ndarray",
        "null": "none nonetype null",
    }.items()
    for name in names.split()
}
# fmt: on
PLAIN_TYPES = {name: {"type": kind} for name, kind in TYPES.items()}
PLAIN_TYPES |= {name: {"type": "array", "uniqueItems": True} for name in ("set", "hashset", "frozenset")}
PLAIN_TYPES |= {"any": {}, "enum": {}, "timestamp": {"type": ["string", "number"]}}  # as text, or since 1970
OPTIONAL = re.compile(r"(?:,\s*)?\(?\boptional\)?\s*$", re.IGNORECASE)  # the end of "str, optional"
NOTE = re.compile(r"(?:(?<=\w)\s*\([^()]*\)|,\s*required)\s*$")  # the end of "DATE (YYYY-MM-DD)"
LIST_OF = re.compile(r"^\s*(?:list|array) of (\w+?)s?\s*$", re.IGNORECASE)
PACKAGE = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)")  # the start of "java.util.List"
ARRAY = re.compile(r"([\w.]+(?:\[[^\[\]]+\])?)\[\]")  # "int[]"
BRACKETS = str.maketrans("<>", "[]")  # List<String>
OPTIONAL_MARKS = (OPTIONAL, re.compile(r"^\s*(?:typing\.)?optional\[", re.IGNORECASE))
# Keywords of JSON Schema whose value is a schema, a list of schemas, or an object of named ones.
SINGLE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")  # until 2019-09, `items` too
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def map_schemas(schema: dict, change: Callable[[object, str], object]) -> dict:
    """Return a schema with change(part, keyword) in place of each schema directly in it; a property null is dropped."""
    changed = dict(schema)
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            changed[key] = {name: change(part, key) for name, part in value.items() if part is not None}
        elif key in LISTED and isinstance(value, list):
            changed[key] = [change(part, key) for part in value]
        elif key in SINGLE:
            changed[key] = change(value, key)
    return changed


def to_union(parts: list[dict]) -> dict:
    """Return the schema of a value that fits one of these schemas."""
    parts = [one for part in parts for one in (part["anyOf"] if part.keys() == {"anyOf"} else [part])]
    if all(part.keys() == {"type"} for part in parts):
        return {"type": [*dict.fromkeys(name for part in parts for name in as_list(part["type"]))]}
    return {"anyOf": parts}


def to_type(node: ast.expr) -> dict | None:
    """Return the schema of a type that is written as this Python expression, None if its meaning is not clear."""
    match node:
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Name(id=name):
            return PLAIN_TYPES.get(name.lower())
        case ast.BinOp(left=left, op=ast.BitOr() | ast.Div(), right=right):
            name, parts = "union", [left, right]
        case ast.Subscript(value=ast.Name(id=name), slice=inside):
            parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        case _:
            return None
    name = name.lower()
    if name == "literal" and all(isinstance(part, ast.Constant) for part in parts):
        return {"enum": [part.value for part in parts]}
    if name == "tuple" and [*map(ast.unparse, parts[1:])] == ["..."]:
        name, parts = "list", parts[:1]
    # Inside of another type, an object is anything, as in Map<String, Object>.
    schemas = [{} if isinstance(part, ast.Name) and part.id.lower() == "object" else to_type(part) for part in parts]
    if None in schemas:
        return None
    kind = PLAIN_TYPES.get(name, {})
    match name, schemas:
        case "tuple", [_, *_]:
            return {"type": "array", "prefixItems": schemas, "minItems": len(schemas), "maxItems": len(schemas)}
        case "optional", [item]:
            return to_union([item, {"type": "null"}])
        case "union", [_, *_]:
            return to_union(schemas)
        case _, [item] if kind.get("type") == "array":
            return {"type": "array", "items": item, **kind}
        case _, [{"type": "string"}, value] if kind.get("type") == "object":
            return {"type": "object", "additionalProperties": value}
    return None


def parse_type(text: str) -> dict | None:
    """Return the schema of a type as any of TYPES' languages writes it, None if its meaning is not clear."""
    text = NOTE.sub("", OPTIONAL.sub("", text[:500]))  # a longer one is none
    if plain := PLAIN_TYPES.get(text.strip().lower()):
        return plain
    text = PACKAGE.sub("", LIST_OF.sub(r"list[\1]", text).translate(BRACKETS).replace(" or ", " | "))
    while (wrapped := ARRAY.sub(r"list[\1]", text)) != text:  # from inside to outside
        text = wrapped
    try:
        return to_type(parse_python(text))
    except ValueError:
        return None


def drop_nulls(found: dict, changes: Counter) -> dict:
    """Return the object without its nulls, which a table fills in; null alone may be a default or a constant."""
    nulls = {key for key, value in found.items() if value is None}
    if nulls <= {"default", "const"}:
        return found
    changes.update(f"{key[:40]} null -> removed" for key in found if key in nulls)
    return {key: value for key, value in found.items() if key not in nulls}


def replace_type(schema: dict, changes: Counter) -> dict:
    """Return the schema with its foreign type in JSON Schema; what the schema itself says beside it stays."""
    old, new = schema.get("type"), None
    if isinstance(old, str):
        new = parse_type(old)
    elif isinstance(old, list) and all(isinstance(name, str) for name in old):  # ["STRING", "null"]
        parts = [*map(parse_type, old)]
        new = to_union(parts) if None not in parts else None
    if new is None or new == {"type": old}:
        return schema
    kind = new.get("type", "any of several" if new else "any")
    before, after = (" or ".join(map(str, as_list(name)))[:40] for name in (old, kind))
    changes[f"type {before} -> {after}"] += 1
    new = {key: value for key, value in new.items() if key == "type" or key not in schema}
    return {k: v for key, value in schema.items() for k, v in (new if key == "type" else {key: value}).items()}


def drop_mark(schema: object) -> object:
    """Return a property's schema without a `required` of its own."""
    marked = isinstance(schema, dict) and isinstance(schema.get("required"), bool)
    return {key: value for key, value in schema.items() if key != "required"} if marked else schema


def list_required(schema: dict, changes: Counter) -> dict:
    """Return the schema with `"required": true` inside a property moved to the list of the schema."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return schema
    marked = [name for name, part in properties.items() if drop_mark(part) is not part]
    if not marked:
        return schema
    changes["required true or false in a property -> list"] += len(marked)
    required = required + [name for name in marked if properties[name]["required"] and name not in required]
    properties = {name: drop_mark(part) for name, part in properties.items()}
    return {**schema, "properties": properties, "required": required}


def to_schema(schema: object, changes: Counter) -> object:
    """Return a JSON Schema in which foreign types and dialects are replaced at every place that holds a schema."""
    if not isinstance(schema, dict):
        return schema
    for step in (drop_nulls, replace_type, list_required):
        schema = step(schema, changes)
    parts = [part for key in NAMED if isinstance(schema.get(key), dict) for part in schema[key].values()]
    changes.update(["property null -> removed"] * parts.count(None))
    return map_schemas(schema, lambda part, _: to_schema(part, changes))


def is_optional(parameter: dict) -> bool:
    """Return whether a parameter of a flat list may be left out, by its own word or by its type or default."""
    if isinstance(parameter.get("required"), bool):
        return not parameter["required"]
    kind = parameter.get("type")
    return "default" in parameter or any(mark.search(kind) for mark in OPTIONAL_MARKS if isinstance(kind, str))


def to_parameters(parameters: object, changes: Counter) -> object:
    """Return a tool's parameters as JSON Schema; flat ones, {"city": {"type": "str"}}, become an object's properties.

    A parameter may itself be called `type` or `properties`. So parameters are flat if all of them are objects, save for
    a list of those required, and unless all in `properties` are schemas again.
    """
    if not isinstance(parameters, dict):
        return parameters
    parameters = drop_nulls(parameters, changes)  # first, or what they leave would look flat when it is read again
    inner = parameters.get("properties")
    nested = isinstance(inner, dict) and all(isinstance(value, dict | bool | None) for value in inner.values())
    listed = parameters.get("required") if isinstance(parameters.get("required"), list) else None
    flat = {name: value for name, value in parameters.items() if name != "required" or listed is None}
    is_flat = all(isinstance(value, dict) and not name.startswith("$") for name, value in flat.items())
    if is_flat and flat and not nested:
        changes["flat parameters -> schema"] += 1
        required = [name for name, value in flat.items() if not is_optional(value)] if listed is None else listed
        properties = {name: drop_mark(value) for name, value in flat.items()}
        parameters = {"type": "object", "properties": properties, "required": required}
    return to_schema(parameters, changes)
