"""Uploads to the Hugging Face Hub."""

import shlex

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from tool_calling.terminal import UserError


def check_hub(repo: str) -> None:
    """Refuse an upload without a token that may write to this repository, before anything is trained for it."""
    if problem := find_problem(repo):
        raise UserError(f"--push_to_hub {repo}: {problem}")


def find_problem(repo: str) -> str | None:
    """Return why the token of this machine cannot write to a repository, or None if it can."""
    try:
        validate_repo_id(repo)
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        return "no token; run `hf auth login`, or set HF_TOKEN"
    except HfHubHTTPError as error:
        return f"the Hub answers {error.response.status_code} to the token; expected one that may write"
    except ValueError as error:
        return str(error).splitlines()[0]
    except (OSError, httpx.HTTPError) as error:
        return f"the Hub cannot be reached: {str(error).splitlines()[0]}"
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if "/" in repo and repo.split("/")[0] not in owners:
        return f"the token is of {', '.join(owners)}; expected a repository of these"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may only read; expected one that may write"
    return None


def push_folder(repo: str, folder: str) -> str:
    """Upload a folder to the Hub, into a private repository if it is new, and return its address."""
    try:
        repo = HfApi().create_repo(repo, private=True, exist_ok=True).repo_id
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=["run.yaml"],  # it has paths of this machine
            commit_message="Upload by train_qwen3_tool_calling.py",
        )
    except Exception as error:  # of any kind: what was trained is there and must not look lost
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push_to_hub {repo}: {reason}; everything is whole in {folder}, push it with: "
            f"hf upload {repo} {shlex.quote(folder)} . --private --exclude run.yaml"
        ) from None
    return commit.repo_url
