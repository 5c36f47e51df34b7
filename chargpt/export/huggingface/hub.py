"""Upload a folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from chargpt.base.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")


def check_push(name: str) -> None:
    """Refuse a repository that cannot be uploaded to, before any work is done.

    Raises:
        UserError: not ``USER/NAME``, or there is no token.
    """
    import huggingface_hub

    user, _, repository = name.partition("/")
    good = all(_NAME.fullmatch(part) for part in (user, repository))
    if not good or re.search(r"--|\.\.|\.git$", name):
        raise UserError(
            f"{name!r:.120} is not the name of a repository: give --push USER/NAME, of letters, "
            "digits and single '-', '_' and '.'"
        )
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"there is no token of the Hugging Face Hub to upload {name}: run `hf auth login`, or "
            "set HF_TOKEN"
        )


def push(folder: Path, name: str) -> str:
    """Upload the files of a folder to the repository `name`, which is made if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses it or cannot be reached; the folder stays.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="A model of chargpt", create_pr=False
        )
    except Exception as error:  # of five libraries, which have no base class in common
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"{folder} is written, but could not be uploaded to {name} ({reason:.300}): check the "
            "name, the token and the network, then run `hf upload` or export again"
        ) from error
    return str(address)
