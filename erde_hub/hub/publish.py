"""Uploading what a run left: checkpoint, preprocessing, model card, results and picture, in one commit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from erde_hub.config import EarlyExitConfig
from erde_hub.errors import CheckpointError, ConfigError
from erde_hub.evaluation.figures import FIGURES
from erde_hub.evaluation.results_file import load_results

from .model_card import render_model_card

#: What may go with config and weights. Other files of a run's folder stay where they are.
WITH_IT = (
    "preprocessor_config.json",
    "results.json",
    "sweep.csv",
    *FIGURES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "model.safetensors.index.json",
)


def publish_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = "apache-2.0",
    commit_message: str = "Upload early-exit model",
    token: str | None = None,
) -> str:
    """Uploads a checkpoint folder and returns the address of the commit.

    The card is rendered anew from ``results.json``, so that it names the repository; without results the folder's own
    ``README.md`` is taken. Everything is checked before the first request: config, weights, card.

    Args:
        folder: Left by a recipe or by ``save_pretrained``.
        repo_id: ``org/name``; made if it is not there.
        private: Whether it is made private; an existing one keeps its state.
        revision: Branch; made if it is not there.
        license: Licence of the weights, as the Hub spells it; None leaves it out of the card.
        commit_message: First line of the commit.
        token: Of the Hub; None takes the one that ``hf auth login`` stored.

    Raises:
        CheckpointError: The folder holds no complete checkpoint, or a link to a file outside it.
        ConfigError: ``repo_id`` is no repository name, or the stored config is not allowed.
        ResultsError: ``results.json`` is damaged.
        HfHubHTTPError: The Hub refuses the token or the upload.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id {repo_id!r} is no repository name such as 'org/name': {error}") from error
    folder = Path(folder)
    files = _files(folder)
    with tempfile.TemporaryDirectory() as made:
        card = _card(folder, Path(made), repo_id, license)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [(path.name, path) for path in files] + ([("README.md", card)] if card else [])
        staged = Path(made) / "upload"
        staged.mkdir()
        for name, path in operations:
            (staged / name).symlink_to(path.resolve())
        commit = api.upload_folder(repo_id=repo, folder_path=staged, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)


def _files(folder: Path) -> list[Path]:
    """Files of a complete checkpoint."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(folder)!r} holds no config.json: give the folder of a checkpoint")
    EarlyExitConfig.from_pretrained(folder)  # refuses what a stranger could not load
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise CheckpointError(f"{str(folder)!r} holds no model.safetensors: the checkpoint is not complete")
    for path in weights:
        try:
            with safe_open(path, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is damaged ({error}): save the checkpoint again") from error
    found = [folder / "config.json", *weights, *(folder / name for name in WITH_IT if (folder / name).is_file())]
    for path in found:
        _check_inside(path, folder)
    return found


def _check_inside(path: Path, folder: Path) -> None:
    """Raises :class:`CheckpointError` for a symbolic link to a file outside the folder, which may be private."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{path.name} is a symbolic link to a file outside {str(folder)!r}, which is not uploaded: put a copy of"
            " the file in its place if it belongs to the checkpoint"
        )


def _card(folder: Path, made: Path, repo_id: str, license: str | None) -> Path | None:
    if (folder / "results.json").is_file():
        path = made / "README.md"
        text = render_model_card(load_results(folder / "results.json"), repo_id=repo_id, license=license)
        path.write_text(text, encoding="utf-8")
        return path
    path = folder / "README.md"
    if not path.is_file():
        return None
    _check_inside(path, folder)
    return path
