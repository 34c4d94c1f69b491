"""Uploads: what the Hub must allow before training, what is uploaded, and what is said when it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from doubles import TOKEN, Hub, on_hub

CODE = """
from tool_calling.saving.upload import UserError, check_hub, push_folder
try:
    check_hub({repo!r})
    print(push_folder({repo!r}, "final") if {push} else "fine")
except UserError as error:
    print(error)
"""


def ask(folder: Path, environment: dict, repo: str, push: bool = False) -> str:
    """Return what a process of its own prints: the library reads the Hub's address when it is imported."""
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    environment |= {"HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(repo=repo, push=push)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_final(folder: Path) -> None:
    """Write a folder as a run leaves it."""
    (folder / "final").mkdir()
    (folder / "final" / "README.md").write_text("# x\n")
    (folder / "final" / "run.yaml").write_text("model_id: x\n")


@pytest.mark.parametrize(
    "repo, token, role, message",
    [
        ("me/tools", "", "write", "no token; run `hf auth login`, or set HF_TOKEN"),
        ("me/tools", "hf_wrong", "write", "the Hub answers 401 to the token; expected one that may write"),
        ("me/tools", TOKEN, "read", "the token may only read; expected one that may write"),
        ("you/tools", TOKEN, "write", "the token is of me, us; expected a repository of these"),
        ("me/to ols", TOKEN, "write", "Repo id must"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_training(tmp_path, repo, token, role, message):
    with Hub(role) as hub:
        said = ask(tmp_path, on_hub(hub, token), repo)
    assert said.startswith(f"--push_to_hub {repo}: {message}") and len(said.splitlines()) == 1


def test_a_hub_that_cannot_be_reached_is_named_before_training(tmp_path):
    with Hub() as hub:
        environment = on_hub(hub)
    said = ask(tmp_path, environment, "me/tools")
    assert said.startswith("--push_to_hub me/tools: the Hub cannot be reached: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("repo", ["me/tools", "us/tools", "tools"])
def test_an_upload_that_can_be_is_not_refused(tmp_path, repo):
    with Hub() as hub:
        assert ask(tmp_path, on_hub(hub), repo) == "fine\n"
    assert hub.requests == ["GET /api/whoami-v2"]


def test_an_upload_is_private_and_without_the_paths_of_this_machine(tmp_path):
    make_final(tmp_path)
    with Hub() as hub:
        assert ask(tmp_path, on_hub(hub), "me/tools", push=True) == f"{hub.url}/me/tools\n"
    assert hub.private is True and list(hub.files) == ["README.md"]


def test_an_upload_that_fails_says_that_all_is_there(tmp_path):
    make_final(tmp_path)
    with Hub(fails=["/commit/"]) as hub:
        said = ask(tmp_path, on_hub(hub), "us/x", push=True)
    assert said.startswith("--push_to_hub me/tools: ") and said.endswith(
        "everything is whole in final, push it with: hf upload me/tools final . --private --exclude run.yaml\n"
    )
