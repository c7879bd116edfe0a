"""Adapters on the Hugging Face Hub: `delora.push`, `delora.load` by a repository's name, and `delora.card`.

``huggingface_hub`` is imported when it is needed: pip install "delora[hub]".
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from delora.errors import UserError, nearest_path
from delora.formats import cards, native
from delora.formats import peft as peft_format
from delora.formats.files import AdapterError, read_json

__all__ = ["HubError", "card", "load", "local", "push"]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OURS = (native.JSON, f"adapter-{'[0-9a-f]' * 16}.safetensors")
PEFTS = (peft_format.CONFIG, peft_format.TENSORS)
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


class HubError(AdapterError):
    """The Hub did not do what was asked, or cannot be reached. Its text holds no token.

    >>> str(HubError("no such repository, asked with hf_AbCdEfGhIjKl"))
    'no such repository, asked with hf_***'
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\bhf_\w{8,}", "hf_***", message))


@contextmanager
def _in_words(what: str, token: str | bool | None = None) -> Iterator[Any]:
    """The Hub's library; whatever it raises in this context is a `HubError` without any token, and without its traceback."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(f'{what} needs huggingface_hub: pip install "delora[hub]"') from error
    try:
        yield huggingface_hub
    except UserError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        for secret in (token, huggingface_hub.get_token()):
            text = text.replace(secret, "***") if isinstance(secret, str) and secret else text
        raise HubError(f"{what}: {type(error).__name__}: {text}") from None  # what it was made of may hold a token


def card(
    folder: str | os.PathLike[str],
    *,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    repo: str | None = None,
) -> Path:
    """Write the card of a saved adapter anew, with what only you know, and return the file.

    `delora.save` writes one without data and metrics, for these belong to one state of the weights.

    Args:
        folder: where `delora.save` has written the adapter.
        data: what it was trained on, in a sentence.
        metrics: what was measured, by name.
        repo: the adapter's name on the Hub, for the line that loads it.

    Raises:
        AdapterError: the folder holds no adapter of this library.
        ValueError: a README.md without delora's markers is there, which is left alone.

    >>> import delora, tempfile
    >>> model = delora.inject(nn.Sequential(nn.Linear(4, 4)), delora.LoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as place:
    ...     text = delora.card(delora.save(model, place), data="Reviews", metrics={"accuracy": 0.91}).read_text()
    >>> [line for line in text.splitlines() if "Reviews" in line or "accuracy" in line]
    ['Reviews', '| accuracy | 0.91 |']
    """
    folder = Path(folder)
    described = native.description(folder / native.JSON)
    if not cards.write(folder, described, data=data, metrics=metrics, repo=repo):
        raise ValueError(
            f"{folder / cards.CARD} has no parts of delora's: it is yours, and left alone; delete it, or put {cards.BEGIN!r} "
            f"and {cards.END!r} around the part to write"
        )
    return folder / cards.CARD


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    methods: Iterable[type] = (),
) -> nn.Module:
    """Read an adapter into a model, make it the active one, and freeze everything else. Changes the model and returns it.

    The folder comes from `save`, or from PEFT with an adapter of type LORA, DELORA, IA3 or OFT. If the model has an adapter
    of this name with the same layers and methods, its tensors take the values of the file, so that training can continue;
    otherwise the adapter is added.

    Args:
        model: the base model, with its weights loaded.
        folder: a folder that holds an adapter; or, as text, "user/name", a repository on the Hugging Face Hub, if there is no
            such folder.
        name: the adapter's name in the model.
        revision: of a repository, the commit, tag or branch; a commit is the same for ever, and needs no network once it is in
            the cache.
        allow_other_base: load even if the weights are not those it was trained on; shapes must still fit.
        methods: your own method classes that the adapter may use; those that the model already uses need not be listed.

    Raises:
        AdapterError: the folder cannot be read or does not fit the model; nothing in the model is changed then.
        HubError (an AdapterError): the Hub did not provide it.
        ValueError: a revision of a folder.

    >>> import copy, delora, tempfile, torch
    >>> base = nn.Sequential(nn.Linear(4, 4))
    >>> model = delora.inject(copy.deepcopy(base), delora.DeLoRA(r=2), ["0"])
    >>> with tempfile.TemporaryDirectory() as place:
    ...     again = delora.load(base, delora.save(model, place))
    >>> torch.equal(again(torch.eye(4)), model(torch.eye(4)))
    True
    """
    return native.load(model, local(folder, revision), name, allow_other_base=allow_other_base, methods=methods)


def local(place: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder on this machine: the place itself; or, if there is no such file or folder, the Hub's cache with a repository.

    Raises:
        HubError: the Hub did not provide it.
        ValueError: a revision of a folder.

    >>> local(".")
    PosixPath('.')
    """
    if isinstance(place, str) and not Path(place).exists() and REPOSITORY.fullmatch(place):
        with _in_words(
            f"there is no folder {place}{nearest_path(place)}, and the Hub did not provide such a repository"
        ) as hub:
            return Path(hub.snapshot_download(place, revision=revision, allow_patterns=[*OURS, *PEFTS]))
    if revision is not None:
        what = "but a folder, which has no revisions" if Path(place).exists() else "whose name is as 'user/name'"
        raise ValueError(f"revision={revision!r}: {place} is no repository on the Hub, {what}")
    return Path(place)


def push(
    model: nn.Module | str | os.PathLike[str],
    repo: str,
    *,
    name: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter to a repository on the Hugging Face Hub, in one commit, and return that commit's name.

    What is there of an older adapter is replaced; of a README.md that is there only the parts between delora's markers. Of a
    model whose adapter can be an exact LoRA, PEFT's form goes along: then the Hub's widgets and servers know it. Of
    processes that hold parts of a model, all call this; one uploads, and the others return "".

    Args:
        model: a model with an adapter, or a folder that `save` has written, whose adapter is uploaded as it is.
        repo: "user/name"; it is created if it does not exist.
        name: the adapter's name in the model; the active one if None.
        private: whether a new repository can be seen by others; None leaves it to the account's setting.
        revision: the branch, "main" if None; it is created if it does not exist.
        data: for the card, as in `card`.
        metrics: for the card, as in `card`.
        message: of the commit.
        token: instead of the one that ``hf auth login`` has stored. It is in no message of an error.

    Raises:
        HubError: the Hub refused it, or cannot be reached.
        AdapterError, ValueError: there is no such adapter, or the name is none of a repository; nothing is uploaded then.

    Example (it needs a network and an account, so it is not run here):
        >>> delora.push(model, "user/name", private=True, metrics={"accuracy": 0.91})  # doctest: +SKIP
    """
    if not isinstance(repo, str) or not REPOSITORY.fullmatch(repo):
        raise ValueError(f"repo = {repo!r}: must be a name such as 'user/name'")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        extra: dict[str, Any] = {}
        if isinstance(model, nn.Module):
            native.save(model, folder, name)
            extra = _with_peft(model, folder, name)
            if not (folder / native.JSON).is_file():  # of a model in parts, one process writes
                return ""
        else:
            described = native.description(Path(model) / native.JSON)
            for file in (native.JSON, described["tensors"]["file"]):
                shutil.copyfile(Path(model) / file, folder / file)
        described = native.description(folder / native.JSON)
        (folder / cards.CARD).unlink(missing_ok=True)
        with _in_words(f"{repo} was not uploaded", token) as hub:
            api = hub.HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            try:
                there = api.hf_hub_download(repo, cards.CARD, revision=revision)
                shutil.copyfile(there, folder / cards.CARD)
            except hub.errors.EntryNotFoundError:
                if not isinstance(model, nn.Module) and (Path(model) / cards.CARD).is_file():
                    shutil.copyfile(Path(model) / cards.CARD, folder / cards.CARD)
            cards.write(folder, described, data=data, metrics=metrics, repo=repo, extra=extra)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"An adapter of delora: {described['method']}",
                delete_patterns=[*OURS[1:], *PEFTS],
            )
            return str(commit.oid)


def _with_peft(model: nn.Module, folder: Path, name: str | None) -> dict[str, Any]:
    """Write PEFT's form beside ours if the adapter has one; what the card's front matter says of it."""
    try:
        peft_format.write(model, folder, name)
    except ValueError as error:  # it is no low-rank change, or PEFT reads it as something else
        warnings.warn(f"delora's form alone is uploaded, without PEFT's beside it: {error}", stacklevel=3)
        return {}
    if not (folder / peft_format.CONFIG).is_file():
        return {}
    task = read_json(folder / peft_format.CONFIG).get("task_type")
    extra: dict[str, Any] = {"library_name": "peft", "tags": ["delora", "lora", "peft"]}
    return extra | ({"pipeline_tag": PIPELINES[task]} if task in PIPELINES else {})
