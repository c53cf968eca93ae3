"""The mean of every node over text: the value that a node outside a circuit is held at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse.model.config import FINAL
from sparse.model.gpt import SparseGPT
from sparse.model.modes import still
from sparse.storage.atomic import replace_files

from .mask import Values
from .taps import recorded

MEANS_FILE = "node_means.safetensors"


@torch.no_grad()
def node_means(
    model: SparseGPT,
    blocks: Int[Tensor, "block pos"],
    batch_size: int = 16,
    locations: list[str] | None = None,
    where: Bool[Tensor, "block pos"] | None = None,
) -> dict[str, Float[Tensor, " _"]]:
    """Return the mean of every node over all positions of `blocks`, {location: means}.

    With `where`, the mean is over the tokens that it marks: `bridges.save_run` leaves out those
    that are outlying in the dense model. `blocks` must hold no padding. `locations` limits the
    means to some locations, and may name `final_resid` too; by default they are all of
    `SparseGPT.node_widths`. Sums are in float64. Raises ValueError where there are no tokens.

    >>> from bridges import load_run
    >>> from sparse import node_means
    >>> run = load_run("tiny")
    >>> means = node_means(run.sparse, run.heldout()[:2])
    >>> means["0.attn.q"].shape == (run.sparse.node_widths()["0.attn.q"],)
    True
    """
    wanted = torch.ones_like(blocks, dtype=torch.bool) if where is None else where.to(blocks.device)
    if not wanted.any():
        raise ValueError("node_means: no tokens; pass at least one block of text")
    names = list(model.node_widths()) if locations is None else locations
    sums = {at: torch.zeros(model.node(at).width, dtype=torch.float64) for at in names}
    device = next(model.parameters()).device
    for ids, own in zip(blocks.split(batch_size), wanted.split(batch_size), strict=True):
        with still(model), recorded(model, names) as values:
            model.model(ids.to(device), use_cache=False)
        for at, value in values.items():
            if where is not None:
                value = torch.where(own.to(device)[..., None], value, 0.0)
            sums[at] += value.double().sum((0, 1)).cpu()
    return {at: (total / int(wanted.sum())).float() for at, total in sums.items()}


def save_means(folder: str | Path, means: Values, fingerprint: str) -> None:
    """Write the node means of the model with this fingerprint into the model's folder.

    The file is written whole or not at all. It also records the fingerprint and a hash of the
    values, which `load_means` checks.
    """
    values = {at: value.detach().cpu().contiguous() for at, value in means.items()}
    record = {"model_fingerprint": fingerprint, "sha256": _hash(values)}
    replace_files(Path(folder), {MEANS_FILE: save(values, record)})


def load_means(
    folder: str | Path, fingerprint: str | None = None
) -> dict[str, Float[Tensor, " _"]]:
    """Return the node means that `save_means` wrote into a sparse model's folder.

    With `fingerprint`, means of another model are a ValueError. An older file, which does not
    record its model, is taken as it is. Raises ValueError where the file is missing or broken.
    """
    path = Path(folder) / MEANS_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; make it with node_means and save_means, pass means=, or prune "
            "with ablation='zero'"
        )
    try:
        with safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
            values = {at: file.get_tensor(at) for at in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}); make it again with save_means") from error
    if record.get("sha256", digest := _hash(values)) != digest:
        raise ValueError(f"{path} is broken (other values were saved); make it again")
    if fingerprint is not None and record.get("model_fingerprint", fingerprint) != fingerprint:
        raise ValueError(
            f"{path} holds the node means of model {record['model_fingerprint']}, but this model "
            f"is {fingerprint}; make them again with node_means and save_means, or pass means="
        )
    return values


def ablation_values(
    model: SparseGPT,
    kind: Literal["mean", "zero"],
    means: Values | None,
    who: str,
    final: bool = False,
) -> dict[str, Float[Tensor, " _"]]:
    """Return the values at which nodes are held when they are not kept, {location: values}.

    The locations are in forward order. For kind "zero" the values are 0. For "mean" they are
    `means`, or the means in the model's own folder where `means` is None. With `final` there are
    values for `final_resid` too. Raises ValueError where there are no means, or none for some node;
    `who` is the function that the message names.
    """
    widths = model.node_widths() | ({FINAL: model.d_resid} if final else {})
    if kind == "zero":
        return {at: torch.zeros(width) for at, width in widths.items()}
    if means is None:
        if model.source is None:
            raise ValueError(
                f"{who}: the model was made in memory, so no folder holds its node means; pass "
                "means=node_means(model, blocks), or take ablation='zero'"
            )
        means = load_means(model.source.folder, model.fingerprint())
    if wrong := [at for at, width in widths.items() if at not in means or len(means[at]) != width]:
        locations = ", locations=[*model.node_widths(), 'final_resid']" if final else ""
        raise ValueError(
            f"{who}: the node means have no value, or not one for every node, at {wrong}; make "
            f"them with node_means(model, blocks{locations})"
        )
    return {at: means[at].detach().float().cpu() for at in widths}


def _hash(values: Values) -> str:
    """Return a hash of the names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for at, value in sorted(values.items()):
        digest.update(f"{at} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
