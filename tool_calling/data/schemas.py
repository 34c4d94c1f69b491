"""Schemas of arguments: foreign types and dialects in, JSON Schema 2020-12 out."""

import ast
import re
from collections import Counter
from collections.abc import Callable

from tool_calling.data.literals import as_list, parse_python
from tool_calling.terminal import shorten

# fmt: off
TYPES = {  # a type as Python, Java or Gemini writes it, in lower case: JSON Schema's
    "str": "string", "string": "string",
    "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean",
    "dict": "object", "object": "object",
    "list": "array", "tuple": "array", "array": "array",
    "none": "null", "nonetype": "null", "null": "null",
}
TYPE_NAMES = {  # in messages
    "integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false",
    "array": "an array", "object": "an object",
}
# fmt: on
PLAIN_TYPES = {name: {"type": kind} for name, kind in TYPES.items()}
PLAIN_TYPES |= {"any": {}, "set": {"type": "array", "uniqueItems": True}}
OPTIONAL = re.compile(r"(?:,\s*)?\(?\boptional\)?\s*$", re.IGNORECASE)  # the end of "str, optional"
OPTIONAL_MARKS = (OPTIONAL, re.compile(r"^\s*(?:typing\.)?optional\[", re.IGNORECASE))
# Keywords of JSON Schema whose value is a schema, a list of schemas, or an object of named ones.
SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
COMBINED = ("allOf", "anyOf", "oneOf", "then", "else")  # parts of one value's schema


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
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            name, parts = "union", [left, right]
        case ast.Subscript(value=ast.Name(id=name), slice=inside):
            parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        case _:
            return None
    name = name.lower()
    if name == "tuple" and [*map(ast.unparse, parts[1:])] == ["..."]:
        name, parts = "list", parts[:1]
    schemas = [*map(to_type, parts)]
    if None in schemas:
        return None
    match name, schemas:
        case "list" | "array", [item]:
            return {"type": "array", "items": item}
        case "set", [item]:
            return {"type": "array", "items": item, "uniqueItems": True}
        case "dict", [{"type": "string"}, value]:
            return {"type": "object", "additionalProperties": value}
        case "tuple", [_, *_]:
            return {"type": "array", "prefixItems": schemas, "minItems": len(schemas), "maxItems": len(schemas)}
        case "optional", [item]:
            return to_union([item, {"type": "null"}])
        case "union", [_, *_]:
            return to_union(schemas)
    return None


def parse_type(text: str) -> dict | None:
    """Return the schema of a type as Python or upper case writes it, None if its meaning is not clear."""
    try:
        return to_type(parse_python(OPTIONAL.sub("", text).replace("typing.", "")))
    except ValueError:
        return None


def drop_nulls(found: dict, changes: Counter) -> dict:
    """Return the object without its nulls, which say nothing; but null may be a default or a constant."""
    kept = {key: value for key, value in found.items() if value is not None or key in ("default", "const")}
    changes.update(f"{key[:40]} null -> removed" for key in found if key not in kept)
    return kept


def replace_type(schema: dict, changes: Counter) -> dict:
    """Return the schema with its foreign type in JSON Schema; what the schema itself says beside it stays."""
    old, new = schema.get("type"), None
    if isinstance(old, str):
        new = parse_type(old)
    elif isinstance(old, list):  # ["STRING", "null"]
        names = [TYPES.get(name.lower(), name) if isinstance(name, str) else name for name in old]
        new = {"type": [name for index, name in enumerate(names) if name not in names[:index]]}
    if new is None or new == {"type": old}:
        return schema
    kind = new.get("type", "any of several" if new else "any")
    before, after = (" or ".join(map(str, as_list(name)))[:40] for name in (old, kind))
    changes[f"type {before} -> {after}"] += 1
    new = {key: value for key, value in new.items() if key == "type" or key not in schema}
    return {k: v for key, value in schema.items() for k, v in (new if key == "type" else {key: value}).items()}


def replace_dialect(schema: dict, changes: Counter) -> dict:
    """Return the schema with what OpenAPI 3.0 and earlier drafts write otherwise in the words of today's JSON Schema.

    OpenAPI's `nullable` counts beside a type or alternatives (https://spec.openapis.org/oas/v3.0.3#schema-object).
    Until Draft 4 a flag made a bound exclusive, and until 2019-09 the items of a tuple stood in `items`.
    """
    schema, kinds, choices = dict(schema), as_list(schema["type"]) if "type" in schema else [], schema.get("anyOf")
    if isinstance(nullable := schema.get("nullable"), bool) and (kinds or isinstance(choices, list) or not nullable):
        del schema["nullable"]
        if nullable and kinds:
            schema["type"] = [*kinds, *["null"] * ("null" not in kinds)]
        elif nullable:
            schema["anyOf"] = [*choices, {"type": "null"}]
        changes["nullable -> type null" if nullable else "nullable false -> removed"] += 1
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(flag), bool):
            exclusive = schema.pop(flag) and bound in schema
            if exclusive:
                schema[flag] = schema.pop(bound)
            changes[f"{flag} {'true -> number' if exclusive else 'without effect -> removed'}"] += 1
    if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
        if items := schema.pop("items"):
            schema["prefixItems"] = items
        if isinstance(schema.get("additionalItems"), dict | bool):
            schema["items"] = schema.pop("additionalItems")
        changes["items of a tuple -> prefixItems"] += 1
    return schema


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
    for step in (drop_nulls, replace_type, replace_dialect, list_required):
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


def names_properties(schema: object) -> bool:
    """Return whether a schema lists properties, by itself or by what it is combined of."""
    return isinstance(schema, dict) and (
        not schema.keys().isdisjoint(("properties", "$ref"))
        or any(names_properties(part) for key in COMBINED for part in as_list(schema.get(key)))
    )


def to_strict(schema: object, whole: bool = True) -> object:
    """Return the schema with unknown arguments refused wherever `properties` are listed and nothing else is said.

    A definition or an alternative is not the `whole` schema of a value: what is unknown is decided where these are
    combined, by `unevaluatedProperties`, which knows what each of them has let pass
    (https://json-schema.org/draft/2020-12/json-schema-core#section-11.3). So what names no property says that it lets
    any pass, but for a part that only chooses among properties beside it, as {"required": ["a"]} does.
    """

    def to_part(part: object, key: str) -> object:
        asks = key in ("not", "if", "contains", "propertyNames")  # and lets nothing pass
        if asks or part is True and key in ("items", "additionalProperties"):
            return part
        return to_strict(part, whole=key not in (*COMBINED, "$defs", "definitions", "dependentSchemas"))

    if schema is True:
        return {"additionalProperties": True}
    if not isinstance(schema, dict):
        return schema
    strict = map_schemas(schema, to_part)
    if schema.keys() & {"additionalProperties", "unevaluatedProperties"}:
        return strict
    if names_properties(schema) and "patternProperties" not in schema:
        combined = schema.keys() & {*COMBINED, "$ref", "if", "dependentSchemas"}
        word = "unevaluatedProperties" if combined else "additionalProperties"  # which is faster
        return {**strict, word: False} if whole else strict
    if (
        whole
        or "patternProperties" in schema
        or "object" in as_list(schema.get("type"))
        or schema.keys().isdisjoint((*COMBINED, "if", "not", "required"))
    ):
        strict["additionalProperties"] = True
    return strict


def describe(error) -> str:
    """Return a jsonschema ValidationError as `arguments.time.hour must be an integer, got "7"`."""
    path = "arguments" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    wanted, got = error.validator_value, f", got {shorten(error.instance)}"
    match error.validator:
        case "type":
            return f"{path} must be {' or '.join(TYPE_NAMES.get(name, name) for name in as_list(wanted))}{got}"
        case "enum":
            return f"{path} must be one of {', '.join(map(shorten, wanted))}{got}"
        case "required":
            return f"{path}.{error.message.rsplit(' is a required', 1)[0][1:-1]} is missing"
        case "additionalProperties" | "unevaluatedProperties" if wanted is False:
            unknown = next((name for name in error.instance if repr(name) in error.message), "")
            return f"{path}.{unknown} is not an argument of this tool"
        case "anyOf" | "oneOf":  # as {...} or null: what is wrong with the only one of the value's type
            within = [part for part in error.context if part.relative_schema_path]  # `false` has none
            inner = [part for part in within if part.validator != "type" or part.relative_path]
            if len({part.relative_schema_path[0] for part in inner}) == 1:
                return describe(inner[0])
    return f"{path}: {error.message if len(error.message) < 200 else f'{error.validator} is not met'}"
