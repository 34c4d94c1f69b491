"""The rules of the house: layers, layout, sizes, and a README that says what the command line says."""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train_qwen3_tool_calling as script

SCRIPT = ROOT / "train_qwen3_tool_calling.py"
MODULES = sorted((ROOT / "tool_calling").rglob("*.py"))
# Libraries that take seconds to import, or must come after Unsloth: modules that answer before torch reach them inside
# of functions; unsloth itself is optional.
LATE = {
    "transformers",
    "unsloth",
    "unsloth_zoo.fused_losses",
    "tool_calling.data.hub_rows",
    "tool_calling.data.tables",
    "tool_calling.saving.served",
}
LINES = 13_302  # of the script and the package: a ratchet, to be lowered


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def list_functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["lint-imports", "--no-cache"]])
def test_lint(command):
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run([str(program), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", [SCRIPT, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(path):
    for function in list_functions(path):
        lines = function.end_lineno - function.lineno + 1
        parameters = len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
        table = function.name == "build_parser"  # of all flags
        assert lines <= 60 or table, f"{path}: {function.name} has {lines} lines"
        assert parameters <= 6, f"{path}: {function.name} has {parameters} parameters"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_script_sees_the_namespace(path):
    assert "argparse.Namespace" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    inner = [
        node
        for function in list_functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in inner for alias in node.names}
    assert {name for name in names if name not in LATE and name.split(".")[0] not in LATE} == set()


@pytest.mark.parametrize("path", [SCRIPT, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_public_function_says_what_it_is(path):
    assert ast.get_docstring(parse(path)), f"{path} has no docstring"
    tops = [node for node in parse(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in tops if not ast.get_docstring(node)] == []


def test_the_house_stays_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (SCRIPT, *MODULES)}
    assert sum(lines.values()) <= LINES
    assert max(count for path, count in lines.items() if path != SCRIPT) < 400


def list_flags() -> list[argparse.Action]:
    return [action for action in script.build_parser()._actions if action.dest != "help"]


def test_ci_runs_the_test_command_of_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^pip install .* && python -m pytest.*$", readme, re.MULTILINE)) == 1  # as .ci/run reads it
    assert len(readme.splitlines()) <= 250


def test_readme_names_each_flag_as_help_does():
    """The table is what `PYTHONPATH=.:tests python tests/test_house.py` prints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `--.*$", readme, re.MULTILINE) == write_table()


def write_table() -> list[str]:
    """Return the rows of README's table of flags, from the parser's own words."""
    rows = []
    for action in list_flags():
        default = "" if action.default is False or action.default in (argparse.SUPPRESS, None) else action.default
        shown = "on" if default is True else f"`{default}`" if default != "" else ""
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
        rows.append(f"| {names} | {shown} | {action.help}{choices} |")
    return rows


if __name__ == "__main__":  # prints the table for README
    print("\n".join(write_table()))
