"""Reading: files, folders and Hub datasets give exact rows with exact places; a broken one gives one exact line."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from datetime import date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, native, patch, run_script, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_qwen3_tool_calling as script
from tool_calling.data.hub_rows import drop_null_columns
from tool_calling.data.rows import match_hub, read_rows
from tool_calling.data.tools import read_tools
from tool_calling.terminal import UserError

A, B, C = ({"input": name, "output": {"content": name.upper()}} for name in "abc")
EXPECTED_LINE = "; expected one JSON object a line, or a JSON array"


def read(*paths: object, max_samples: int | None = None) -> list[tuple]:
    """The (where, row) pairs of the paths, a broken row as its message."""
    rows = read_rows([str(path) for path in paths], max_samples)
    return [(where, str(row) if isinstance(row, ValueError) else row) for where, row in rows]


def error_of(*paths: object) -> str:
    with pytest.raises(UserError) as error:
        read(*paths)
    return str(error.value)


# --- JSON and JSONL files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n{"a": 2}\n',
        '{"a": 1}\r\n{"a": 2}\r\n',
        '{"a": 1}\n{"a": 2}',
        '\ufeff{"a": 1}\n{"a": 2}\n',
        '{"a": 1}\n\ufeff{"a": 2}\n',  # two files that each begin with a mark, joined
        '[{"a": 1},\n{"a": 2}]',
        '\ufeff[{"a": 1},\r\n{"a": 2}]\r\n',
        '{"a":\t1}\n  {"a": 2}  \n \n',
    ],
)
def test_the_same_rows_in_every_layout(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode())
    assert read(path) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]


def test_blank_lines_count_and_hold_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n \n{"a": 1}\n\n{"a": 2}\n')
    assert read(path) == [(f"{path}:3", {"a": 1}), (f"{path}:5", {"a": 2})]
    path.write_text("\n" * 70_000 + '{"a": 1}\n')  # the first row lies behind the first block that is looked at
    assert read(path) == [(f"{path}:70001", {"a": 1})]


def test_line_separators_inside_a_text_are_data(tmp_path):
    rows = [{"a": "one\u2028two\u2029three\u0085four"}, {"a": "five"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read(path) == [(f"{path}:1", rows[0]), (f"{path}:2", rows[1])]


def test_pretty_printed_objects_are_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(A, indent=2))
    assert read(path) == [(f"{path}:1", A)]
    path.write_text("\n" + json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2) + "\n\n" + json.dumps(C) + "\n")
    assert read(path) == [(f"{path}:2", A), (f"{path}:8", B), (f"{path}:15", C)]
    path.write_text(json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2)[:-4])
    assert error_of(path) == f"{path}:11: not valid JSON: Expecting ',' delimiter"
    path.write_text('{\n  "input": "a",\n  "output": {"content": "b"},\n}\n' + json.dumps(B, indent=2))
    assert error_of(path).startswith(f"{path}:4: not valid JSON: ")  # of the first object, too


def test_a_first_line_that_was_cut_is_one_bad_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ['{"input": "x",', B, '{"input": "x"', C])
    assert read(path) == [
        (f"{path}:1", "not valid JSON: Expecting property name enclosed in double quotes" + EXPECTED_LINE),
        (f"{path}:2", B),
        (f"{path}:3", "not valid JSON: Expecting ',' delimiter" + EXPECTED_LINE),
        (f"{path}:4", C),
    ]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"a": 1} {"a": 2}', "not valid JSON: Extra data"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', 'not valid JSON: the key "x" stands twice'),
        (b'{"a": -Infinity}', "not valid JSON: -Infinity is not JSON"),
        (b'{"a": 1e999}', "not valid JSON: the number 1e999 is too large"),
        (b'{"a": ' + b"7" * 4301 + b"}", "not valid JSON: a number has more than 4,300 digits"),
        (b"[" * 100_000, "not valid JSON: it is nested too deeply"),
        (b'{"a": "\\ud83d"}', "not valid JSON: \\ud83d is half a character"),
    ],
)
def test_a_broken_line_is_a_problem_of_its_own(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(A).encode() + b"\n" + line + b"\n" + json.dumps(B).encode() + b"\n")
    assert read(path) == [(f"{path}:1", A), (f"{path}:2", problem + EXPECTED_LINE), (f"{path}:3", B)]
    path.write_bytes(b"[\n" + json.dumps(A).encode() + b",\n" + line + b"\n]")  # an array ends at it
    if problem.endswith("Extra data"):  # a missing comma is no harm in an array
        assert [row for _, row in read(path)] == [A, {"a": 1}, {"a": 2}]
    else:
        assert error_of(path) == f"{path}:3: {problem}"


def test_a_line_that_is_not_utf8_names_its_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": "caf\xc3\xa9"}\n')
    assert read(path) == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:2", "not UTF-8 text (byte 10); save it as UTF-8 JSON or JSONL"),
        (f"{path}:3", {"a": "café"}),
    ]
    path.write_bytes(b'[{"a": 1},\n{"a": "caf\xe9"}]')
    assert error_of(path) == f"{path}: not UTF-8 text (byte 21); save it as UTF-8 JSON or JSONL"


@pytest.mark.parametrize("encoding, byte", [("utf-16", 0), ("utf-16-le", 1), ("utf-16-be", 0), ("utf-32-le", 1)])
def test_other_encodings_are_named_once(tmp_path, encoding, byte):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n{"a": 2}\n'.encode(encoding))
    assert error_of(path) == f"{path}: not UTF-8 text (byte {byte}); save it as UTF-8 JSON or JSONL"


def test_both_halves_of_a_character_are_one_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ['{"a": "\\ud83d\\ude00", "b": "\\u00e9"}'])
    assert read(path) == [(f"{path}:1", {"a": "😀", "b": "é"})]


def test_what_follows_an_array_is_not_lost(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}]\n\n')
    assert read(path) == [(f"{path}:1", {"a": 1})]
    path.write_text('[{"a": 1}]\n[{"a": 2}]\n')
    assert error_of(path) == f"{path}:1: more follows the ] of the array; expected the end of the file"


def test_a_table_of_text_is_named_and_rows_under_its_name_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffinput,output\n"x","y"\n')
    assert error_of(path) == f"{path}: is a table of text; expected JSON or JSONL: convert it first"
    path.write_text('\ufeff {"a": 1}\n')
    assert list(read_rows([str(path)])) == [(f"{path}:1", {"a": 1})]


def test_files_that_are_no_text_are_one_line(tmp_path):
    pipe, packed, zipped = tmp_path / "pipe.jsonl", tmp_path / "rows.jsonl.gz", tmp_path / "rows.zip"
    os.mkfifo(pipe)
    packed.write_bytes(gzip.compress(b'{"a": 1}'))
    zipped.write_bytes(b"PK\x03\x04rest")
    assert error_of(pipe) == f"{pipe}: is not a regular file; expected JSON or JSONL"
    assert error_of(packed) == f"{packed}: is gzip; expected JSON or JSONL: unpack or convert it first"
    assert error_of(zipped) == f"{zipped}: is zip; expected JSON or JSONL: unpack or convert it first"
    with pytest.raises(UserError) as error:
        read_tools(str(tmp_path))
    assert str(error.value) == f"{tmp_path}: is not a regular file; expected JSON or JSONL"


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [A, B])
    rows = read_rows([path])
    assert next(rows) == (f"{path}:1", A)
    with open(path, "a") as file:
        file.write(json.dumps(C) + "\n")
    with pytest.raises(UserError) as error:
        list(rows)
    assert str(error.value) == f"{path}: changed while it was read; start again when nothing writes to it"


def test_the_limit_counts_over_all_files(tmp_path):
    first, second = (write_jsonl(tmp_path / name, [A, B]) for name in ("1.jsonl", "2.jsonl"))
    assert read(first, second, max_samples=3) == [(f"{first}:1", A), (f"{first}:2", B), (f"{second}:1", A)]
    assert read(first, tmp_path / "absent.jsonl", max_samples=2) == [(f"{first}:1", A), (f"{first}:2", B)]


def test_a_bar_on_a_terminal_changes_no_row(tmp_path, monkeypatch, capsys):
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([A, B], indent=1))
    path = write_jsonl(tmp_path / "rows.jsonl", [A, "{", B])
    plain = read(path, array)
    assert len(plain) == 5 and capsys.readouterr().out == ""
    patch(monkeypatch, "SHOWN_BYTES", 0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert read(path, array) == plain
    assert capsys.readouterr().out != ""


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.sampled_from(
                [
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b'"a"',
                    b'"',
                    b"\n",
                    b"\r",
                    b" ",
                    b"1",
                    b"-",
                    b"NaN",
                    b"1e999",
                    b"\xff",
                    b"\xef\xbb\xbf",
                    b"\\ud800",
                    b"null",
                    b"{}",
                    b'{"a": 1}',
                ]
            ),
            max_size=20,
        ).map(b"".join),
    )
)
def test_any_bytes_give_rows_problems_or_one_line(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    try:
        places = [where for where, row in read(path) if json.dumps(row).encode()]
        assert places and all(re.fullmatch(re.escape(str(path)) + r"(:\d+|\[\d+\])", where) for where in places)
        assert len(set(places)) == len(places)
    except UserError as error:
        assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1


# --- Folders ---------------------------------------------------------------------------------------------------


def test_a_folder_is_its_files_in_order(tmp_path):
    for name in (
        "b/2.JSONL",
        "b/10.jsonl",
        "a.json",
        ".hidden.jsonl",
        ".git/x.jsonl",
        "tools.json",
        "b/tools.json",
        "dataset_info.json",
        "notes.txt",
        "c.jsonl.bak",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    (tmp_path / "folder.json").mkdir()
    expected = ("a.json", "b/10.jsonl", "b/2.JSONL")
    assert read(tmp_path) == [(f"{tmp_path}/{name}:1", {"name": name}) for name in expected]
    assert read(tmp_path / "tools.json") == [(f"{tmp_path}/tools.json:1", {"name": "tools.json"})]  # by its own name


def test_a_folder_in_a_hidden_folder_is_read(tmp_path):
    (tmp_path / ".cache" / "mine").mkdir(parents=True)
    path = write_jsonl(tmp_path / ".cache" / "mine" / "rows.jsonl", [A])
    assert read(tmp_path / ".cache" / "mine") == [(f"{path}:1", A)]


def test_the_tools_of_the_run_are_no_rows_of_a_folder(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [A])
    (tmp_path / "my_tools.json").write_text("[]")
    assert list(read_rows([str(tmp_path)], tools_path=str(tmp_path / "my_tools.json"))) == [(f"{path}:1", A)]


def test_a_folder_without_rows_is_one_line(tmp_path):
    (tmp_path / "tools.json").write_text("[]")
    assert error_of(tmp_path) == f"{tmp_path}: holds no .json or .jsonl file of rows; expected at least one"
    (tmp_path / "rows.jsonl").write_text("")
    assert error_of(tmp_path) == (
        f"{tmp_path}/rows.jsonl: is empty; expected a JSON array of rows, or one JSON object a line"
    )


# --- Hub datasets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, expected",
    [
        ("org/name", ("org/name", None, None)),
        ("name", ("name", None, None)),
        ("org/name-v1.5:test", ("org/name-v1.5", None, "test")),
        ("org/name:single-turn:test.small", ("org/name", "single-turn", "test.small")),
    ],
)
def test_hub_names_are_recognised(path, expected):
    assert match_hub(path).groups() == expected


@pytest.mark.parametrize(
    "path",
    [
        "no/such.json",
        "rows.jsonl",
        "rows.jsonl.gz",
        "a/b/c",
        "./name",
        "../name",
        "/name",
        "org/name:train[:10]",
        "org/",
        "a b",
        "",
        "C:\\rows",
    ],
)
def test_other_names_are_files(path):
    assert match_hub(path) is None
    assert error_of(path) == f"{path}: cannot be read: No such file or directory"


def test_what_exists_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "org" / "name" / "rows.jsonl", [A])
    assert read("org/name") == [("org/name/rows.jsonl:1", A)]
    assert error_of("org/name:train") == "org/name:train: cannot be read: No such file or directory"
    assert error_of("json") == "json: cannot be read: No such file or directory"  # a name that means any file


def test_only_the_nulls_of_columns_are_dropped():
    from datasets import Features, Json, List, Value

    text = Value("string")
    features = Features(
        {
            "input": text,
            "system": text,
            "raw": Json(),
            "tags": List(text),
            "turns": List({"a": text}),
            "output": {"content": text, "call": {"name": text, "arguments": {"x": text, "y": text}}},
        }
    )
    row = {
        "input": "i",
        "system": None,
        "raw": {"kept": None},
        "tags": ["t", None],
        "turns": [{"a": None}, {"a": "b"}],
        "output": {"content": None, "call": {"name": "f", "arguments": {"x": None, "y": None}}},
    }
    assert drop_null_columns(row, features) == {
        "input": "i",
        "raw": {"kept": None},
        "tags": ["t", None],
        "turns": [{}, {"a": "b"}],
        "output": {"call": {"name": "f", "arguments": {}}},
    }


def run_reader(*paths: str, **environment: str) -> subprocess.CompletedProcess:
    """Read the paths in a new process and print the pairs as JSON, or the error."""
    code = (
        "import json, sys, tool_calling.data.rows as s\n"
        "try:\n    print(json.dumps([[where, str(row) if isinstance(row, ValueError) else row]\n"
        "                      for where, row in s.read_rows(sys.argv[1:])]))\n"
        "except s.UserError as error:\n    print('error:', error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A datasets cache that holds org/Calls with the splits train and test, as a download would have left it."""
    from datasets import Dataset, Features, Value, load_dataset

    folder = tmp_path_factory.mktemp("cache")
    text = Value("string")
    features = Features(
        {
            "input": text,
            "asked": Value("date32"),
            "output": {
                "content": text,
                "function_call": {
                    "name": text,
                    "arguments": {"city": text, "days": Value("int64"), "on": Value("timestamp[s]")},
                },
            },
        }
    )
    rows = [
        native("rain?", ("get_weather", {"city": "Rome"})),
        native("bye", content="Bye."),
        native("and in 2 days?", ("get_weather", {"days": 2})),
        native("again", ("get_weather", {})),
        native("may", ("get_weather", {"on": datetime(2024, 5, 1)})),
    ]
    for split, part in (("train", rows), ("test", rows[:1])):
        table = Dataset.from_list([{"asked": date(2024, 5, 1), **row} for row in part], features=features)
        table.to_parquet(folder / f"{split}.parquet")
    load_dataset(
        "parquet",
        data_files={split: str(folder / f"{split}.parquet") for split in ("train", "test")},
        cache_dir=str(folder / "made"),
    )
    (info,) = folder.glob("made/parquet/*/*/*/dataset_info.json")
    target = folder / "datasets" / "org___calls" / "default" / "0.0.0" / info.parent.name
    target.mkdir(parents=True)
    (target / info.name).write_text(json.dumps({**json.loads(info.read_text()), "config_name": "default"}))
    for split in ("train", "test"):
        (info.parent / f"parquet-{split}.arrow").rename(target / f"calls-{split}.arrow")
    return folder / "datasets"


def test_a_cached_dataset_is_read_offline_without_its_nulls(cache):
    result = run_reader("org/Calls", "org/Calls:test", "org/Calls:default:test", HF_DATASETS_CACHE=str(cache))
    assert result.stderr == "" and result.returncode == 0
    weather = native("rain?", ("get_weather", {"city": "Rome"}))
    assert json.loads(result.stdout) == [
        ["org/Calls:train[0]", weather],
        ["org/Calls:train[1]", native("bye", content="Bye.")],
        ["org/Calls:train[2]", native("and in 2 days?", ("get_weather", {"days": 2}))],
        ["org/Calls:train[3]", native("again", ("get_weather", {}))],
        [
            "org/Calls:train[4]",
            "holds the datetime 2024-05-01 00:00:00; expected text or another JSON value "
            "(a table may have made dates of texts: name the dataset's own file instead)",
        ],
        ["org/Calls:test[0]", weather],
        ["org/Calls:default:test[0]", weather],
    ]


def test_a_split_that_is_not_there_names_the_others(cache):
    result = run_reader("org/Calls:dev", HF_DATASETS_CACHE=str(cache))
    assert (result.stdout, result.stderr) == (
        'error: org/Calls: has no split "dev"; expected org/Calls:train or org/Calls:test\n',
        "",
    )


def test_the_command_line_takes_a_dataset(cache, tmp_path, tools_path):
    result = run_script(
        "--dataset_path",
        "org/Calls",
        "--tools_path",
        tools_path,
        "--model_id",
        "no/such/model",
        "--output_dir",
        tmp_path / "out",
        "--final_model_dir",
        tmp_path / "final",
        HF_DATASETS_CACHE=str(cache),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        'error: org/Calls:train[2]: call 1 "get_weather": arguments.city is missing',
        'error: org/Calls:train[3]: call 1 "get_weather": arguments.city is missing',
        "error: org/Calls:train[4]: holds the datetime 2024-05-01 00:00:00; expected text or another JSON value "
        "(a table may have made dates of texts: name the dataset's own file instead)",
        "error: 3 problems in 3 of 5 rows; fix them or skip these rows with --on_invalid skip",
    ]


def test_offline_and_not_cached_is_one_line(tmp_path):
    result = run_reader("org/other", HF_DATASETS_CACHE=str(tmp_path))
    assert (result.stdout, result.stderr) == (
        "error: org/other: is no file or folder, not in the local cache, and the Hub cannot be reached; "
        "unset HF_HUB_OFFLINE\n",
        "",
    )


class RefusingHub(BaseHTTPRequestHandler):
    """A Hub on this machine that knows no dataset but one, and that one is gated."""

    def do_HEAD(self):
        gated = "org/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        """Keep the test's output clean."""


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "org/none",
            "is no file or folder, and no public dataset on the Hub; check the name, or log in with: hf auth login",
        ),
        (
            "org/gated",
            "is gated; accept its terms at https://huggingface.co/datasets/org/gated, log in with: hf auth login",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, name, message):
    server = ThreadingHTTPServer(("127.0.0.1", 0), RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = run_reader(
        name,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path),
        no_proxy="127.0.0.1",
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
    )
    server.shutdown()
    assert (result.stdout, result.stderr) == (f"error: {name}: {message}\n", "")


# --- Size ------------------------------------------------------------------------------------------------------


def write_many(path: Path, count: int) -> str:
    """Write `count` rows like the bundled ones, each with a request of its own."""
    rows = json.loads((ROOT / script.DATASET_PATH).read_text(encoding="utf-8"))
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            row = rows[index % len(rows)]
            file.write(json.dumps({**row, "input": f"{row['input']} ({index})"}) + "\n")
    return str(path)


def test_the_memory_of_reading_does_not_grow_with_the_file(tmp_path):
    path = write_many(tmp_path / "rows.jsonl", 250_000)
    assert os.path.getsize(path) > 45 * 2**20
    tracemalloc.start()
    count = sum(1 for _ in read_rows([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 250_000 and peak < 2**20, peak


def test_a_hundred_thousand_rows_fit_into_a_gibibyte(tmp_path):
    path = write_many(tmp_path / "rows.jsonl", 100_000)
    code = (
        "import re, sys, tool_calling.data.examples as s\nfrom tool_calling.data.rows import read_rows\n"
        "c = s.to_examples(read_rows([sys.argv[1]]), 'data/tools.json')\n"
        "print(len(c.examples), len(c.problems), c.total, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=ROOT)
    *counts, peak = map(int, result.stdout.split())
    print(f"100,000 rows read, converted and checked in {time.perf_counter() - start:.1f} s, {peak / 2**10:.0f} MiB")
    assert counts == [100_000, 0, 100_000]
    assert peak < 2**20  # KiB
