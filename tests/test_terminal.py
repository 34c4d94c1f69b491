"""What a run prints: lines, tables, warnings, shortened values, problems; secrets stay hidden."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from tool_calling.terminal import (
    UserError,
    cut_text,
    hide_secrets,
    list_first,
    make_console,
    plural,
    report_problems,
    say,
    shorten,
    suggest,
    warn,
)


def test_secrets_and_passwords_are_hidden(monkeypatch):
    for name, value in (("HF_TOKEN", "hf_abcdefghij"), ("WANDB_API_KEY", "short"), ("HUGGING_FACE_HUB_TOKEN", "")):
        monkeypatch.setenv(name, value)
    assert hide_secrets("a hf_abcdefghij, b=hf_abcdefghij; short") == "a $HF_TOKEN, b=$HF_TOKEN; short"
    assert hide_secrets("git+https://me:pass@hub.example/x?a=b@c") == "git+https://hub.example/x?a=b@c"
    assert hide_secrets("write to me@example.com or https://example.com/@me") == (
        "write to me@example.com or https://example.com/@me"
    )


def test_a_stage_is_a_line_with_a_column_of_its_own(capsys):
    say("read", "24 rows")
    say("", "more of it")
    assert capsys.readouterr() == ("read     24 rows\n         more of it\n", "")


def test_only_the_main_process_warns(capsys, monkeypatch):
    warn("look out")
    warn("a.jsonl:3: no tools", "skipped")
    monkeypatch.setenv("RANK", "1")
    warn("look out")
    assert capsys.readouterr() == ("", "warning: look out\nskipped: a.jsonl:3: no tools\n")


def test_a_reader_that_is_gone_ends_nothing():
    code = """
import sys
from tool_calling.terminal import make_console, say
for _ in range(3):
    say("read", "x" * 100_000)
    make_console().print("x" * 100_000)
print("still here", file=sys.stderr)
"""
    command = f"{sys.executable} -c '{code}' | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "still here\n")


def test_a_console_colours_no_numbers(capsys):
    make_console(soft_wrap=True, force_terminal=True).print("step 3 of 9")
    assert capsys.readouterr().out == "step 3 of 9\n"


@pytest.mark.parametrize(
    "count, noun, text",
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (2000, "row", "2,000 rows"),
        (1, "batch", "1 batch"),
        (2, "batch", "2 batches"),
    ],
)
def test_nouns_are_counted(count, noun, text):
    assert plural(count, noun) == text


def test_the_first_names_and_how_many_more():
    assert list_first([], 2) == ""
    assert list_first(["a", "b"], 2) == "a, b"
    assert list_first((str(i) for i in range(1003)), 2) == "0, 1, and 1,001 more"


def test_the_nearest_name_is_suggested():
    assert suggest("cosin", ["linear", "cosine"]) == "; did you mean cosine?"
    assert suggest("magic", ["linear", "cosine"]) == ""


@pytest.mark.parametrize(
    "value, text",
    [
        ("é 7", '"é 7"'),
        ({"a": [1, None, True]}, '{"a": [1, null, true]}'),
        ("a  b\n", '"a  b\\n"'),
        ({1}, '"{1}"'),
        ("x" * 78, '"' + "x" * 78 + '"'),
        ("x" * 79, '"' + "x" * 78 + "…"),
    ],
)
def test_values_are_shown_as_json_of_at_most_80_characters(value, text):
    assert shorten(value) == text and len(text) <= 80


def test_texts_are_cut_and_stand_on_one_line():
    assert cut_text("  one\n\n  two \r\n three\n") == "one two three"
    assert cut_text("a  b\tc") == "a  b\tc"
    assert cut_text("x" * 200) == "x" * 200 and cut_text("x" * 201) == "x" * 199 + "…"
    assert cut_text("abcdef", 4) == shorten(1234567, 4).replace("123", "abc") == "abc…"


def test_no_problem_is_no_error(capsys):
    assert report_problems([], "error", 3) is report_problems([], "skip", 3) is None
    assert capsys.readouterr() == ("", "")


def test_problems_are_listed_with_what_to_do():
    with pytest.raises(UserError) as error:
        report_problems([("a:1", "no tools"), ("a:1", "no answer"), ("b:7", "empty")], "error", 1500)
    assert str(error.value) == (
        "a:1: no tools\na:1: no answer\nb:7: empty\n"
        "3 problems in 2 of 1,500 rows; fix them or skip these rows with --on_invalid skip"
    )
    with pytest.raises(UserError) as error:
        report_problems([("tools.json", "tool 1: no name")], "error", 1, "tool")
    assert str(error.value) == "tools.json: tool 1: no name\n1 problem in 1 of 1 tool"


@pytest.mark.parametrize("count, more", [(20, ""), (21, ", the first 20 above")])
def test_the_first_20_problems_are_listed(count, more):
    with pytest.raises(UserError) as error:
        report_problems([(f"a:{i}", "empty") for i in range(count)], "error", 99, "tool")
    assert str(error.value).splitlines() == [
        *(f"a:{i}: empty" for i in range(20)),
        f"{count} problems in {count} of 99 tools{more}",
    ]


def test_every_skipped_row_is_named(capsys):
    report_problems([(f"a:{i}", "empty") for i in (*range(25), 3)], "skip", 1000)  # a row that is taken twice: once
    out, err = capsys.readouterr()
    assert out == "skip     25 problems in 25 of 1,000 rows, named above\n"
    assert err == "".join(f"skipped: a:{i}: empty\n" for i in range(25))
