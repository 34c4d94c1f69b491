"""Uploads to the Hugging Face Hub."""

import shlex

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from tool_calling.terminal import UserError


def check_hub(repo: str | None) -> None:
    """Refuse an upload that has no token that may write there, before anything is trained for it."""
    if repo is None:
        return
    try:
        validate_repo_id(repo)
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"--push_to_hub {repo}: no token; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"--push_to_hub {repo}: the Hub answers {error.response.status_code} to the token; expected "
            "one that may write"
        ) from None
    except ValueError as error:
        raise UserError(f"--push_to_hub {repo}: {str(error).splitlines()[0]}") from None
    except (OSError, httpx.HTTPError) as error:
        raise UserError(f"--push_to_hub {repo}: the Hub cannot be reached: {str(error).splitlines()[0]}") from None
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if "/" in repo and repo.split("/")[0] not in owners:
        raise UserError(f"--push_to_hub {repo}: the token is of {', '.join(owners)}; expected a repository of these")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub {repo}: the token may only read; expected one that may write")


def push_folder(repo: str, folder: str) -> str:
    """Upload a folder to the Hub, to a private repository if it is new, and return its address."""
    try:
        repo = HfApi().create_repo(repo, private=True, exist_ok=True).repo_id
        # run.yaml has the paths of this machine.
        return (
            HfApi()
            .upload_folder(
                repo_id=repo,
                folder_path=folder,
                ignore_patterns=["run.yaml"],
                commit_message="Upload by train_qwen3_tool_calling.py",
            )
            .repo_url
        )
    except Exception as error:  # of whatever kind: what was trained is there, and must not look lost
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push_to_hub {repo}: {reason}; everything is whole in {folder}, push it with: "
            f"hf upload {repo} {shlex.quote(folder)} . --private --exclude run.yaml"
        ) from None
