"""Push an exported folder to the Hub: private unless the repository exists, nothing else sent."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi


def files_to_push(folder: str | Path) -> list[str]:
    """Relative paths that a push would upload. Errors: ValueError for pickled files."""
    root = Path(folder)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    pickled = [f for f in files if Path(f).suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    if pickled:
        raise ValueError(f"push_to_hub: expected safetensors and text only, got {pickled[:3]}.")
    if not files:
        raise ValueError(f"push_to_hub: expected an exported folder, got {root} without files.")
    return files


def push_folder(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload `folder` to `repo_id`; returns the repository's URL. The token is huggingface_hub's.

    Args: private: visibility where the repository does not exist yet.
    """
    files_to_push(folder)
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        folder_path=str(folder), repo_id=repo_id, commit_message="Add stepdistill export"
    )
    return str(url)
