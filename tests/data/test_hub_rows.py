"""Datasets of the Hub: rows without the nulls that a table fills in; what cannot be had is one line."""

import json
import os
import subprocess
import sys
import threading
from datetime import date, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, native, run_script


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
    names = ("org/Calls:1", "org/Calls:test:2", "org/Calls:default:test")  # a number is never a split
    result = run_reader(*names, HF_DATASETS_CACHE=str(cache))
    assert result.stderr == "" and result.returncode == 0
    *printed, rows = result.stdout.splitlines()
    assert printed == [
        "read     org/Calls:1: 5 rows of 5",
        "read     org/Calls:test:2: 2 rows of 1",
        "read     org/Calls:default:test: 1 row of 1",
    ]
    dated = {"asked": ["date32[day]"]}  # no format reads it
    weather = {**dated, **native("rain?", ("get_weather", {"city": "Rome"}))}
    assert json.loads(rows) == [
        ["org/Calls:train[0]", weather],
        ["org/Calls:train[1]", {**dated, **native("bye", content="Bye.")}],
        ["org/Calls:train[2]", {**dated, **native("and in 2 days?", ("get_weather", {"days": 2}))}],
        ["org/Calls:train[3]", {**dated, **native("again", ("get_weather", {}))}],
        [
            "org/Calls:train[4]",
            "holds the datetime 2024-05-01 00:00:00; expected text or another JSON value "
            "(a table may have made dates of texts: name the dataset's own file instead)",
        ],
        ["org/Calls:test[0]", weather],
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
