"""`asvr export --push-to-hub`: an exported model as a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars

from manifests.errors import InputError, StorageError
from manifests.remote_errors import client_errors


def push_model(export: Path, repo: str, *, private: bool) -> str:
    """Publish the export in the folder `export` as the model `repo` (OWNER/NAME), in one commit; its URL.

    Pushed again, only what differs is sent, and files that are no longer part of the export go. Raises InputError for a
    name that no repository can have, StorageError when the Hub refuses or is out of reach.
    """
    disable_progress_bars()
    api, url = HfApi(), f"hf://{repo}"
    try:
        with client_errors("publish", url, lambda: False):
            api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=export,
                repo_type="model",
                commit_message="Exported by asvr",
                delete_patterns="*",
            )
    except StorageError as error:
        if isinstance(error.__cause__, HFValidationError):
            raise InputError(f"{repo!r} is not the name of a repository: give OWNER/NAME") from error
        raise
    return url
