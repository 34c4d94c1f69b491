"""Schemas of arguments: foreign types and dialects in, JSON Schema out."""

import ast
import re
from collections import Counter

from tool_calling.data.literals import as_list, parse_python
from tool_calling.terminal import shorten

TYPES = {  # types as Python, Java or Gemini write them, in lower case
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "dict": "object",
    "object": "object",
    "list": "array",
    "tuple": "array",
    "array": "array",
    "none": "null",
    "nonetype": "null",
    "null": "null",
}
PLAIN_TYPES = {
    **{name: {"type": kind} for name, kind in TYPES.items()},
    "any": {},
    "set": {"type": "array", "uniqueItems": True},
}
SCHEMA_PLACES = {  # keywords of JSON Schema: what stands there
    "one": ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    "list": ("anyOf", "oneOf", "allOf", "prefixItems"),
    "named": ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"),
}
SCHEMA_SUBJECTS = {"type", "properties", "patternProperties", "additionalProperties", "$ref", "anyOf", "oneOf", "allOf"}
SCHEMA_NOTES = {"$schema", "$id", "$defs", "definitions", "title", "description", "required"}  # they name no property
OPTIONAL = re.compile(r"(?:,\s*)?\(?\boptional\)?\s*$", re.IGNORECASE)  # the end of "str, optional"


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
    schemas = [to_type(part) for part in parts]
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
    before, after = (" or ".join(map(str, as_list(name))) for name in (old, kind))
    changes[f"type {before[:40]} -> {after[:40]}"] += 1
    new = {name: part for name, part in new.items() if name == "type" or name not in schema}
    return {k: v for key, value in schema.items() for k, v in (new if key == "type" else {key: value}).items()}


def list_required(schema: dict, changes: Counter) -> dict:
    """Return the schema with `"required": true` inside a property moved to the list of the schema."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not isinstance(schema.get("required", []), list):
        return schema
    marked = {
        name: value["required"]
        for name, value in properties.items()
        if isinstance(value, dict) and isinstance(value.get("required"), bool)
    }
    if not marked:
        return schema
    changes["required true or false in a property -> list"] += len(marked)
    properties = {
        name: {key: item for key, item in value.items() if key != "required"} if name in marked else value
        for name, value in properties.items()
    }
    required = [*schema.get("required", [])]
    required += [name for name, needed in marked.items() if needed and name not in required]
    return {**schema, "properties": properties, "required": required}


def replace_dialect(schema: dict, changes: Counter) -> dict:
    """Return the schema with what OpenAPI 3.0 and earlier drafts write otherwise in the words of today's JSON Schema.

    OpenAPI's `nullable` counts beside a type or alternatives (https://spec.openapis.org/oas/v3.0.3#schema-object); a
    bound was made exclusive by a flag until Draft 4, and the items of a tuple stood in `items` until 2019-09.
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


def drop_nulls(found: dict, changes: Counter) -> dict:
    """Return the object without its nulls, which say nothing, except as a value of the argument itself."""
    kept = {key: value for key, value in found.items() if value is not None or key in ("default", "const")}
    changes.update(f"{key[:40]} null -> removed" for key in found if key not in kept)
    return kept


def to_schema(schema: object, changes: Counter) -> object:
    """Return a JSON Schema in which foreign types are replaced at every place that holds a schema."""
    if not isinstance(schema, dict):
        return schema
    for step in (drop_nulls, replace_type, replace_dialect, list_required):
        schema = step(schema, changes)
    for key, value in schema.items():
        if key in SCHEMA_PLACES["named"] and isinstance(value, dict):
            schema[key] = {name: to_schema(part, changes) for name, part in value.items() if part is not None}
            changes.update(["property null -> removed"] * (len(value) - len(schema[key])))
        elif key in SCHEMA_PLACES["list"] and isinstance(value, list):
            schema[key] = [to_schema(part, changes) for part in value]
        elif key in SCHEMA_PLACES["one"]:
            schema[key] = to_schema(value, changes)
    return schema


def is_optional(parameter: dict) -> bool:
    """Return whether a parameter of a flat list may be left out, by its own word or by its type or default."""
    if isinstance(parameter.get("required"), bool):
        return not parameter["required"]
    kind = parameter.get("type")
    by_type = isinstance(kind, str) and bool(OPTIONAL.search(kind) or re.match(r"\s*(typing\.)?optional\[", kind, re.I))
    return by_type or "default" in parameter


def to_parameters(parameters: object, changes: Counter) -> object:
    """Return a tool's parameters as JSON Schema; flat ones, {"city": {"type": "str"}}, become an object's properties.

    A parameter may itself be called `type` or `properties`: flat are parameters that are objects one and all, but for a
    list of those required, unless `properties` holds schemas one and all again, as a schema's does.
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
        properties = {
            name: {key: item for key, item in value.items() if key != "required" or not isinstance(item, bool)}
            for name, value in flat.items()
        }
        parameters = {"type": "object", "properties": properties, "required": required}
    return to_schema(parameters, changes)


TYPE_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
COMBINED = ("allOf", "anyOf", "oneOf", "then", "else")  # where parts of a value's schema stand


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
    if schema is True:
        return {"additionalProperties": True}
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    for key, value in schema.items():
        if key in SCHEMA_PLACES["named"] and isinstance(value, dict):
            of_values = key in ("properties", "patternProperties")
            strict[key] = {name: to_strict(part, whole=of_values) for name, part in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            strict[key] = to_strict(value)
        elif key == "prefixItems" and isinstance(value, list):
            strict[key] = [*map(to_strict, value)]
        elif key in COMBINED:
            parts = [to_strict(part, whole=False) for part in as_list(value)]
            strict[key] = parts if isinstance(value, list) else parts[0]
    if schema.keys() & {"additionalProperties", "unevaluatedProperties"}:
        return strict
    if names_properties(schema) and "patternProperties" not in schema:
        word = (
            "unevaluatedProperties"
            if schema.keys() & {*COMBINED, "$ref", "if", "dependentSchemas"}
            else ("additionalProperties")
        )  # which is faster
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
    got = f", got {shorten(error.instance)}"
    if error.validator == "type":
        types = [TYPE_NAMES.get(name, name) for name in as_list(error.validator_value)]
        return f"{path} must be {' or '.join(types)}{got}"
    if error.validator == "enum":
        return f"{path} must be one of {', '.join(shorten(value) for value in error.validator_value)}{got}"
    if error.validator == "required":
        return f"{path}.{error.message.rsplit(' is a required', 1)[0][1:-1]} is missing"
    if error.validator in ("additionalProperties", "unevaluatedProperties") and error.validator_value is False:
        unknown = next((name for name in error.instance if repr(name) in error.message), "")
        return f"{path}.{unknown} is not an argument of this tool"
    if error.validator in ("anyOf", "oneOf"):  # as {...} or null: what is wrong with the only one of the value's type
        inner = [part for part in error.context if part.validator != "type" or part.relative_path]
        if len({part.relative_schema_path[0] for part in inner}) == 1:
            return describe(inner[0])
    return f"{path}: {error.message if len(error.message) < 200 else f'{error.validator} is not met'}"
