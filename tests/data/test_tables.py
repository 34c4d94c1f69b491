"""Tables: rows without the nulls that columns fill in, whatever the types; a file that is none is one line."""

import json
import subprocess
import sys
from datetime import date, datetime

import pyarrow
import pytest
from conftest import ROOT, WEATHER, native, run_here, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tool_calling.data.containers import ANSWER_KEYS, CONTAINERS, QUESTION_KEYS, SHAREGPT_KEYS
from tool_calling.data.examples import Reading, to_examples
from tool_calling.data.rows import COLUMNS, read_rows
from tool_calling.data.tables import is_json, to_rows, to_values
from tool_calling.terminal import UserError


def read(path) -> list[tuple]:
    """The (source, row) pairs of a file, a broken row as its message."""
    return [(source, str(row) if isinstance(row, ValueError) else row) for source, row in read_rows([str(path)])]


def write(path, rows: list[dict], **options) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def calling(city: str, **more) -> dict:
    """An OpenAI row with one call."""
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city, **more}}}
    messages = [{"role": "user", "content": city}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages, "tools": [WEATHER]}


def test_a_parquet_file_gives_the_rows_that_were_written(tmp_path):
    """The arguments of one call are nulls in all others, and a message without calls has null calls."""
    rows = [calling("Rome"), calling("Oslo", days=2), {"messages": [{"role": "user", "content": "x"}], "tools": []}]
    path = write(tmp_path / "rows.parquet", rows, row_group_size=1)
    expected = json.loads(json.dumps(rows).replace('"content": null, ', ""))
    assert read(path) == [(f"{path}[{index}]", row) for index, row in enumerate(expected)]
    other = tmp_path / "rows.data"  # what it begins with counts
    other.write_bytes((tmp_path / "rows.parquet").read_bytes())
    assert [row for _, row in read(other)] == expected


def test_only_the_nulls_of_columns_are_dropped():
    text, pair = pyarrow.string(), pyarrow.struct([("x", pyarrow.string()), ("y", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("input", text),
            ("system", text),
            ("raw", pyarrow.json_(text)),
            ("tags", pyarrow.list_(text)),
            ("turns", pyarrow.large_list(pyarrow.struct([("a", text)]))),
            ("pair", pyarrow.list_(pyarrow.int32(), 2)),
            ("map", pyarrow.map_(text, pair)),
            ("output", pyarrow.struct([("content", text), ("call", pyarrow.struct([("arguments", pair)]))])),
            ("name", pyarrow.dictionary(pyarrow.int8(), text)),
            ("nothing", pyarrow.null()),
        ]
    )
    row = {
        "input": "i",
        "raw": '{"kept": null, "n": [1.5]}',
        "tags": ["t", None],
        "turns": [{"a": None}, None, {"a": "b"}],
        "pair": [1, None],
        "map": [("k", {"x": None, "y": "1"}), ("n", None)],
        "output": {"content": None, "call": {"arguments": {"x": None, "y": None}}},
        "name": "get_weather",
    }
    batch = pyarrow.RecordBatch.from_pylist([{}, row, {"tags": [], "map": []}], schema=schema)
    expected = {
        "input": "i",
        "raw": {"kept": None, "n": [1.5]},
        "tags": ["t", None],
        "turns": [{}, None, {"a": "b"}],
        "pair": [1, None],
        "map": {"k": {"y": "1"}, "n": None},
        "output": {"call": {"arguments": {}}},
        "name": "get_weather",
    }
    whole = [("x[0]", {}), ("x[1]", expected), ("x[2]", {"tags": [], "map": {}})]
    assert [*to_rows([batch], "x")] == whole and all(is_json(kind) for kind in schema.types)
    assert [*to_rows([batch[:1], batch[1:]], "x")] == whole  # a batch that is a part of another


def drop(value: object, kind: pyarrow.DataType) -> object:
    """What to_values should make of a value: slow and plain."""
    if isinstance(value, dict):
        return {key: drop(inner, kind.field(key).type) for key, inner in value.items() if inner is not None}
    return [drop(inner, kind.value_type) for inner in value] if isinstance(value, list) else value


def nest(inner):
    names = st.lists(st.sampled_from("abc"), unique=True, max_size=3)
    structs = names.flatmap(lambda keys: st.tuples(*[inner] * len(keys)).map(lambda kinds: [*zip(keys, kinds)]))
    return structs.map(pyarrow.struct) | inner.map(pyarrow.list_) | inner.map(pyarrow.large_list)


KINDS = st.recursive(st.sampled_from([pyarrow.int64(), pyarrow.string(), pyarrow.bool_()]), nest, max_leaves=6)


def values_of(kind: pyarrow.DataType):
    if pyarrow.types.is_struct(kind):
        some = st.fixed_dictionaries({field.name: values_of(field.type) for field in kind})
    elif pyarrow.types.is_nested(kind):
        some = st.lists(values_of(kind.value_type), max_size=3)
    else:
        some = {"int64": st.integers(0, 9), "string": st.text("xy", max_size=2), "bool": st.booleans()}[str(kind)]
    return st.none() | some


@settings(max_examples=300, deadline=None)
@given(KINDS.flatmap(lambda kind: st.tuples(st.just(kind), st.lists(values_of(kind), max_size=6), st.integers(0, 3))))
def test_columns_give_what_values_one_by_one_would(case):
    kind, values, start = case
    assert to_values(pyarrow.array(values, type=kind)[start:]) == [drop(value, kind) for value in values[start:]]


def test_what_json_cannot_hold_is_not_read_as_a_column_and_a_problem_inside_a_row(tmp_path):
    picture = {"bytes": b"\x89PNG", "path": None}
    rows = [
        {
            "asked": date(2024, 5, 1),
            "raw": b"x",
            "picture": picture,
            **native("may", ("f", {"on": datetime(2024, 5, 1)})),
        },
        {"asked": date(2024, 5, 2), "raw": None, "picture": None, **native("june", ("f", {"on": None}))},
    ]
    path = write(tmp_path / "rows.parquet", rows)
    advice = "expected text or another JSON value (a table may have made dates of texts: name the dataset's own file "
    assert read(path) == [
        (f"{path}[0]", f"holds the datetime 2024-05-01 00:00:00; {advice}instead)"),
        (f"{path}[1]", {"asked": ["date32[day]"], **native("june", ("f", {}))}),
    ]


def test_a_broken_parquet_file_is_one_line(tmp_path):
    rows = [{"messages": str(i) * 1000} for i in range(1000)]
    whole = (tmp_path / "rows.parquet").read_bytes() if write(tmp_path / "rows.parquet", rows) else b""
    harms = {"cut": whole[:-100], "start": b"PAR1", "middle": whole[:100] + bytes(500) + whole[600:]}
    for name, content in harms.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: cannot be read as Parquet: ")
        assert len(str(error.value).splitlines()) == 1
    path = write(tmp_path / "other.parquet", [{"a": 1, "b": 2}])
    with pytest.raises(UserError) as error:
        read(path)
    expected = 'expected those of a format, as "messages" and "tools"'
    assert str(error.value) == f'{path}: has the columns "a", "b"; {expected}'
    path = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"messages": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="empty.parquet: holds no rows$"):
        read(path)


def test_a_folder_of_all_kinds_is_read_and_converted(tmp_path):
    folder, tools = tmp_path / "all", tmp_path / "tools.json"
    folder.mkdir()
    write(folder / "a.parquet", [calling("Rome")])
    text = {key: json.dumps(value) for key, value in calling("Oslo").items()}
    write(folder / "b.PARQUET", [text])
    cells = ['"' + text[key].replace('"', '""') + '"' for key in ("messages", "tools")]
    (folder / "c.csv").write_text("messages,tools\n" + ",".join(cells) + "\n")
    write_jsonl(folder / "d.jsonl", [calling("Bern")])
    tools.write_text("[]")
    target = tmp_path / "out.jsonl"
    result = run_here("--dataset_path", folder, "--tools_path", tools, "--convert_to", target)
    assert result.returncode == 0 and result.stderr == ""
    cities = [json.loads(line)["messages"][0]["content"] for line in target.read_text().splitlines()]
    assert cities == ["Rome", "Oslo", "Oslo", "Bern"]


def test_native_rows_are_read_out_of_a_table(tmp_path, tools_path):
    """Their output is JSON text there; an answer that is JSON of another kind stays text."""
    answers = [
        json.dumps(native("x", ("get_weather", {"city": "Rome"}))["output"]),
        '{"content": "Yes."}',
        '{"a": 1}',
        "{}",
    ]
    path = write(tmp_path / "rows.parquet", [{"input": "rain?", "output": answer} for answer in answers])
    checked = to_examples(read_rows([path]), Reading(tools_path))
    assert [example.messages[-1]["content"] for example in checked.examples] == ["", "Yes.", '{"a": 1}', "{}"]
    assert [example.format for example in checked.examples] == ["native", "native", "alpaca", "alpaca"]
    assert checked.examples[0].messages[-1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


def test_a_table_of_any_container_is_one_of_rows():
    assert [name for name, container in CONTAINERS.items() if COLUMNS.isdisjoint(container.keys)] == []
    assert COLUMNS >= {*SHAREGPT_KEYS, *QUESTION_KEYS, *ANSWER_KEYS}


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_read_in_little_memory(tmp_path):
    """Written in one piece, with nested columns: read by columns, batch after batch."""
    path = write(tmp_path / "rows.parquet", [calling(f"Town {i}") for i in range(100_000)], row_group_size=10**6)
    code = (
        "import re, sys\nfrom tool_calling.data.rows import read_rows\n"
        "print(sum(1 for _ in read_rows([sys.argv[1]])))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=ROOT)
    count, peak = map(int, result.stdout.split())
    assert count == 100_000 and peak < 300 * 2**10  # KiB
