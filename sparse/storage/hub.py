"""Saving and loading a model: its weights and its card, in a folder or on the Hub.

card.py writes the card, compressed.py leaves the zeros out of the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.hub import cached_file

from .atomic import replace_files
from .card import OURS, Card, markdown
from .compressed import compress, is_compressed, load_compressed, mark

CARD = "card.json"
HUB_ONLY = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
FROM_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model was loaded from or saved to, and a hash of the weights it had there."""

    folder: str
    """The folder as it was given."""
    fingerprint: str
    """`SparseGPT.fingerprint()` at that time."""


class SavedModel(PreTrainedModel):
    """A Hugging Face model that can be saved without its zeros, and that has a card.

    `source` is the folder that the weights came from or went to, None for a model made in memory.
    `card` says how the model was made and what was measured; it goes into README.md, and is None
    where nothing was measured.
    """

    source: Source | None = None
    card: Card | None = None

    def fingerprint(self) -> str:
        """Return a hash of the architecture and of all parameters and buffers, 16 hex digits."""
        architecture: dict[str, Any] = self.config.architecture()  # pyright: ignore
        digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, p in sorted(tensors.items()):
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:  # pyright: ignore
        """Return the model as Hugging Face's method does, with its `source` and its `card`.

        A file that was saved with `sparse=True` is recognised without being told, in a folder or on
        the Hub.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.source = Source(str(pretrained_model_name_or_path), model.fingerprint())
            where = {name: kwargs[name] for name in FROM_WHERE if name in kwargs}
            model.card = _find_card(pretrained_model_name_or_path, **where)
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):  # pyright: ignore
        """Do as transformers does, but expand the files that it found if they are compressed."""
        files = [f for f in checkpoint_files or () if str(f).endswith(".safetensors")]
        if state_dict is None and any([is_compressed(f) for f in files]):
            if "disk" in (load_config.device_map or {}).values():
                raise ValueError(
                    f"{files[0]} is compressed and cannot be offloaded to the disk; choose another "
                    "device_map, or save the model without sparse=True"
                )
            state_dict, checkpoint_files = load_compressed(files), None
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *,
        sparse: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model as Hugging Face's method does, with a README.md and its card.

        With `sparse`, tensors that are sparse enough are stored as indices and values
        (compressed.py); the file loads like any other, to the same bits. card.json is written if
        there is a card and removed if there is none. A README.md that was not written by this
        library is left alone. The folder becomes the model's `source`.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ONLY if name in kwargs}
        tensors = self.state_dict() if state_dict is None else state_dict
        variant = [kwargs["variant"]] if kwargs.get("variant") else []
        folder = Path(save_directory)
        whole = folder / ".".join(["model", *variant, "safetensors"])
        index = folder / ".".join(["model.safetensors.index", *variant, "json"])
        if is_main_process:
            index.unlink(missing_ok=True)
        weights = dict(tensors)  # a copy, since transformers empties the dict
        # tied weights are removed first: among parts transformers could not see which are tied
        if sparse:
            weights = compress(remove_tied_weights_from_state_dict(weights, self))
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if is_main_process:
            if index.exists():  # there are shards now; transformers would load an older whole file
                whole.unlink(missing_ok=True)
            if sparse:
                for name in _written(whole, index):
                    mark(folder / name)
            self._write_card(folder, compressed=sparse, tensors=tensors)
        self.source = Source(str(save_directory), self.fingerprint())
        if push_to_hub and is_main_process:
            self.push_to_hub(**({"repo_id": folder.name} | hub), sparse=sparse, **kwargs)

    def save_card(self, folder: str | Path) -> None:
        """Write README.md and card.json beside the weights of an earlier save, and no weights.

        As in `save_pretrained`, a README.md that was not written by this library is left alone.
        """
        files = Path(folder).glob("model*.safetensors")
        self._write_card(folder, compressed=any([is_compressed(file) for file in files]))

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        sparse: bool = False,
        **saving: Any,
    ) -> str:
        """Upload what `save_pretrained` writes and return the commit's address.

        README.md is written from this model's card, or says that nothing was measured; it replaces
        the one in the repository. `tags` are added to its metadata. `saving` are further arguments
        of `save_pretrained`.
        """
        api, source = HfApi(token=token), self.source
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(name, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, sparse=sparse, **saving)
            self.source = source  # the temporary folder will be gone
            self._write_card(folder, place=name, compressed=sparse, tags=tuple(tags or ()))
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit)

    def _write_card(self, folder: str | Path, **how: Any) -> None:
        """Write README.md, unless another one is there, and write or remove card.json."""
        readme, facts = Path(folder) / "README.md", Path(folder) / CARD
        if not readme.exists() or OURS in readme.read_text(encoding="utf-8", errors="replace"):
            replace_files(folder, {readme.name: markdown(self, self.card, **how)})
        if self.card is not None:
            replace_files(folder, {facts.name: self.card.to_json()})
        else:
            facts.unlink(missing_ok=True)


def _written(whole: Path, index: Path) -> list[str]:
    """Return the names of the weight files that a save has written."""
    if not index.exists():
        return [whole.name]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _find_card(place: str | Path, **where: Any) -> Card | None:
    """Return the card beside the weights, None where there is none."""
    path = cached_file(
        place,
        CARD,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return Card.from_json(Path(path).read_text(encoding="utf-8"), str(path)) if path else None
