"""Validators of arguments: a schema of any dialect as it is meant, with unknown arguments refused."""

from collections.abc import Iterator

import jsonschema
import referencing

from tool_calling.data.literals import as_list, to_json
from tool_calling.data.schemas import map_schemas
from tool_calling.terminal import shorten

COMBINED = ("allOf", "anyOf", "oneOf", "then", "else")  # parts of one value's schema
MORE = {*COMBINED, "$ref", "if", "dependentSchemas"}  # what may name properties beside a schema's own
# fmt: off
TYPE_NAMES = {  # in messages
    "integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false",
    "array": "an array", "object": "an object",
}
PYTHON_TYPES = {  # of values that have a type at a glance: 5.0 may be an integer too
    "integer": {int}, "number": {int, float}, "string": {str}, "boolean": {bool}, "array": {list}, "object": {dict},
    "null": {type(None)},
}
# fmt: on
NOTES = {"description", "title", "default", "examples"}  # refuse no value
PLAIN = {*NOTES, "type", "enum", "minimum", "maximum", "required", "properties", "items", "additionalProperties"}


def fits(value: object, schema: object) -> bool:
    """Return whether a value is valid at a glance; otherwise the validator decides, which takes ten times as long."""
    if isinstance(schema, bool) or not PLAIN.issuperset(schema):
        return schema is True
    kind, choices = schema.get("type"), schema.get("enum")
    if kind is not None and (not isinstance(kind, str) or type(value) not in PYTHON_TYPES[kind]):
        return False
    if choices is not None and (not isinstance(value, str) or value not in choices):
        return False
    if isinstance(value, int | float):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        given = all(fits(inner, known.get(name, other)) for name, inner in value.items())
        return given and value.keys() >= {*schema.get("required", ())}
    return not isinstance(value, list) or all(fits(item, schema.get("items", True)) for item in value)


def check_properties(validator, properties: dict, instance: object, schema: dict) -> Iterator:
    """Yield what JSON Schema's `properties` does, but nothing for a default: its type may differ, as null's does."""
    for name, part in properties.items() if isinstance(instance, dict) else ():
        if name in instance:
            value = instance[name]
            has_default = isinstance(part, dict) and "default" in part and part["default"] == value
            if not has_default or to_json(part["default"]) != to_json(value):  # 1 is neither true nor 1.0
                yield from validator.descend(value, part, path=name, schema_path=name)


def check_given(validator, properties: dict, instance: object, schema: dict) -> Iterator:
    """Yield what check_properties yields, but nothing for a required null: models are taught it for "not given"."""
    if isinstance(instance, dict) and None in instance.values():
        required = schema.get("required", ())
        instance = {name: value for name, value in instance.items() if value is not None or name not in required}
    return check_properties(validator, properties, instance, schema)


def skip(validator, value: object, instance: object, schema: dict) -> None:
    """Let any value pass."""


extend = jsonschema.validators.extend
Validator = extend(jsonschema.Draft202012Validator, {"properties": check_given})
# These are asked about nulls only. A pattern says nothing of these, and may take long.
NullValidator = extend(Validator, {"pattern": skip})
StrictNullValidator = extend(NullValidator, {"properties": check_properties})  # of required ones too


def to_validator(schema: dict, kind: type = Validator):
    """Return the validator of arguments by a schema, which its check_schema has not seen yet."""
    if schema.get("properties") == {} and MORE.isdisjoint(schema) and "patternProperties" not in schema:
        schema = {"additionalProperties": False, **schema}  # a tool without arguments
    # An empty registry: a $ref to elsewhere is a problem, never a download.
    return kind(to_strict(schema), registry=referencing.Registry())


def is_plain(schema: object) -> bool:
    """Return whether a schema is valid at a glance: asking JSON Schema's own schema takes a hundred times as long."""

    def is_fine(key: str, value: object) -> bool:
        match key, value:
            case ("description" | "title", str()) | ("default", _) | ("enum" | "examples", list()):
                return True
            case "minimum" | "maximum", int() | float():
                return not isinstance(value, bool)
            case "type", str():
                return value in PYTHON_TYPES
            case "required", list():
                return all(isinstance(name, str) for name in value) and len({*value}) == len(value)
            case "properties", dict():
                return all(map(is_plain, value.values()))
            case "items" | "additionalProperties", _:
                return is_plain(value)
        return False

    return isinstance(schema, bool) or (isinstance(schema, dict) and all(is_fine(*pair) for pair in schema.items()))


def read_dialect(schema: dict) -> dict:
    """Return the schema of OpenAPI 3.0 or of an earlier draft in the words of today's JSON Schema.

    OpenAPI's `nullable` counts beside a type or alternatives (https://spec.openapis.org/oas/v3.0.3#schema-object).
    Until Draft 4 a flag made a bound exclusive, and until 2019-09 the items of a tuple stood in `items`.
    """
    schema, choices = {key: value for key, value in schema.items() if key != "$schema"}, schema.get("anyOf")
    if schema.get("nullable") is True:
        if "type" in schema:
            schema["type"] = [*dict.fromkeys([*as_list(schema["type"]), "null"])]
        elif isinstance(choices, list):
            schema["anyOf"] = [*choices, {"type": "null"}]
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(flag), bool) and schema.pop(flag) and bound in schema:
            schema[flag] = schema.pop(bound)
    if isinstance(items := schema.get("items"), list) and "prefixItems" not in schema:
        schema |= {"prefixItems": items or [True], "items": schema.pop("additionalItems", True)}
    return schema


def names_properties(schema: object) -> bool:
    """Return whether a schema lists properties, by itself or by what it is combined of."""
    return isinstance(schema, dict) and (
        bool(schema.get("properties"))  # an empty list of properties names none: a free object
        or "$ref" in schema
        or any(names_properties(part) for key in COMBINED for part in as_list(schema.get(key)))
    )


def to_strict(schema: object, whole: bool = True) -> object:
    """Return the schema with unknown arguments refused wherever `properties` are listed and nothing else is said.

    A definition or an alternative is not the `whole` schema of a value: `unevaluatedProperties` decides where these are
    combined, because it knows what each of them has accepted
    (https://json-schema.org/draft/2020-12/json-schema-core#section-11.3). So a schema that names no property must
    accept any, but for one that only chooses among the properties beside it, as {"required": ["a"]} does.
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
    schema = read_dialect(schema)
    strict = map_schemas(schema, to_part)
    if schema.keys() & {"additionalProperties", "unevaluatedProperties"}:
        return strict
    if names_properties(schema) and "patternProperties" not in schema:
        word = "unevaluatedProperties" if MORE & schema.keys() else "additionalProperties"  # which is faster
        return {**strict, word: False} if whole else strict
    is_object = "patternProperties" in schema or "object" in as_list(schema.get("type"))
    if whole or is_object or schema.keys().isdisjoint((*COMBINED, "if", "not", "required")):
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


def list_errors(validator, arguments: object) -> list:
    """Return the errors of the arguments, but no unknown properties of a value that fails otherwise."""
    errors = sorted(validator.iter_errors(arguments), key=lambda error: error.json_path)
    failed = [error.json_path for error in errors if error.validator != "unevaluatedProperties"]
    return [
        error
        for error in errors
        if error.validator != "unevaluatedProperties" or not any(path.startswith(error.json_path) for path in failed)
    ]


def find_nulls(errors: list) -> dict[tuple, bool]:
    """Return {path of a null that the schema refuses: whether the schema knows its key}."""
    found = {}
    for error in errors:
        path, value = tuple(error.absolute_path), error.instance
        if value is None and path and isinstance(path[-1], str):
            found[path] = True
        elif error.validator in ("additionalProperties", "unevaluatedProperties") and isinstance(value, dict):
            unknown = [name for name, inner in value.items() if inner is None and repr(name) in error.message]
            found |= {(*path, name): False for name in unknown if (*path, name) not in found}
        found |= find_nulls(error.context or [])
    return found
