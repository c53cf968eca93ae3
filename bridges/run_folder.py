"""A run folder: a sparse model, its bridges and circuits, and where everything came from.

RUN/manifest.json            dense model (name, fingerprint), prefix, settings, data, versions
RUN/sparse/                  config, safetensors, tokenizer, node_means.safetensors, model card
RUN/bridges/                 state.json, bridges.safetensors
RUN/heldout.safetensors      validation blocks that no training step saw, counts of training tokens
RUN/circuits/<task>/         circuit.json, circuit.safetensors
RUN/skipped.json             the tasks that got no circuit, and why
RUN/log.jsonl, checkpoints/  what training wrote

A fingerprint is a hash of a model's weights; it shows whether two files belong to the same model.
The prefix is what the tokenizer puts before every text (docs/method.md#text): the models were
trained and measured on blocks that begin with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoTokenizer

from bridges.maps.bridge import BridgeSet
from dense import DenseModel, config_of
from sparse.circuits.circuit import Circuit
from sparse.circuits.means import load_means, node_means, save_means
from sparse.model.gpt import SparseGPT
from sparse.ops.prefix import check_begin, count_tokens, prefix_ids
from sparse.storage.atomic import replace_files

SCHEMA_VERSION = 1
TINY = Path(__file__).parent / "tiny_run"
SKIPPED = "skipped.json"
RESTORE = "restore it, or start the training command again"
PACKAGES = ("torch", "transformers", "accelerate", "nnsight", "safetensors", "scipy", "numpy")


@dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run folder: both models, the bridges, the tokenizer. `load_run` makes it.

    The dense model, which may be large, is opened when `dense` is first asked for.
    """

    folder: Path
    """The folder that the run was read from."""
    output: Path
    """Where new circuits and reports go: `folder`, or runs/tiny for the built-in run."""
    open_dense: Callable[[], DenseModel]
    """Returns the dense model, the same one at every call."""
    sparse: SparseGPT
    bridges: BridgeSet
    tokenizer: Any
    """The tokenizer that both models share."""
    manifest: dict[str, Any]
    """What manifest.json says: which dense model, which settings, data and versions."""

    @property
    def dense(self) -> DenseModel:
        """The dense model. Raises ValueError where it is not the one the run was trained with."""
        return self.open_dense()

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens with which every block and every prompt of the run begins; often none."""
        return _prefix_of(self.manifest)

    def __repr__(self) -> str:
        n, dense = len(self.bridges.config.sites), self.manifest["dense"]["name"]
        return f"Run({str(self.folder)!r}, dense {dense!r}, bridges at {n} sites)"

    def circuits(self) -> dict[str, Circuit]:
        """Return the circuits saved in the run, by task name.

        The built-in run keeps new circuits apart, in `output`. Where both places hold a circuit
        for one task, the one in `output` is returned.
        """
        places = dict.fromkeys((self.folder, self.output))
        found = [path for at in places for path in sorted(at.glob("circuits/*/circuit.json"))]
        loaded = (Circuit.load(path.parent) for path in found)
        return {circuit.task.name: circuit for circuit in loaded}

    def skipped(self) -> dict[str, str]:
        """Return {task name: reason} of the tasks that got no circuit (`find_circuits`)."""
        path = self.output / SKIPPED
        if not path.is_file():
            path = self.folder / SKIPPED
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}); delete it") from error
        if not isinstance(found, dict) or not all(isinstance(why, str) for why in found.values()):
            raise ValueError(f"{path} is broken (not reasons by task name); delete it")
        return {name: why for name, why in found.items() if not self._has_circuit(name)}

    def _has_circuit(self, task_name: str) -> bool:
        folder = self.circuit_folder(task_name)
        places = (folder, self.folder / folder.relative_to(self.output))
        return any((at / "circuit.json").is_file() for at in places)

    def circuit_folder(self, task_name: str) -> Path:
        """Return the folder in which a new circuit for a task is saved."""
        return self.output / "circuits" / task_name.replace(":", "-")

    def heldout(self) -> Int[Tensor, "block pos"]:
        """Return the run's validation blocks: token ids that no training step saw."""
        path = self.folder / "heldout.safetensors"
        try:
            return load(path.read_bytes())["blocks"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {RESTORE}") from error

    def token_counts(self) -> Int[Tensor, " vocab"] | None:
        """Return how often every token occurs in the training text; None in a run without counts.

        They are the control of a model's cross entropy: a model that knows only these.
        """
        return load((self.folder / "heldout.safetensors").read_bytes()).get("token_counts")

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the training log, one dict each.

        A training that is killed may leave half a last line; that line is left out.
        """
        path = self.folder / "log.jsonl"
        try:
            lines = path.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {RESTORE}") from error

    def export(self, folder: str | Path) -> None:
        """Write a small copy of the run, to give away.

        It has everything that `load_run` opens. The twin's zero weights are not stored, yet the
        weights load to the same bits. Checkpoints, log and reports are not copied.
        """
        folder, source = Path(folder), self.sparse.source
        of = self.sparse.fingerprint()
        means = load_means(self.folder / "sparse", of)
        try:
            self.sparse.save_pretrained(folder / "sparse", sparse=True)
            copy = self.sparse.source
        finally:
            self.sparse.source = source
        self.tokenizer.save_pretrained(folder / "sparse")
        save_means(folder / "sparse", means, of)
        self.bridges.save(folder / "bridges")
        for name, circuit in self.circuits().items():
            replace(circuit, source=copy).save(folder / "circuits" / name.replace(":", "-"))
        counts = self.token_counts()
        texts = {"blocks": self.heldout()} | ({} if counts is None else {"token_counts": counts})
        files = {"heldout.safetensors": save(texts)}
        if skipped := self.skipped():
            files[SKIPPED] = json.dumps(skipped, indent=1).encode()
        replace_files(folder, files | {"manifest.json": json.dumps(self.manifest, indent=1)})


def save_run(
    folder: str | Path,
    dense: DenseModel,
    sparse: SparseGPT,
    bridges: BridgeSet,
    *,
    heldout: Int[Tensor, "block pos"],
    means_from: Int[Tensor, "_ pos"],
    facts: dict[str, Any],
    token_counts: Int[Tensor, " vocab"] | None = None,
) -> Run:
    """Write a run folder and return it opened.

    `means_from` is the text over which the node means are taken; give training text, because
    ablations hold a node at its mean there; tokens that are outlying in the dense model
    (`BridgeSet`) are left out. `heldout` are the blocks that later evaluations use. `token_counts`
    says how often every token occurs in the training text; by default those of `means_from` are
    counted. `facts` are entries added to the manifest (settings, data, command). The dense model's
    tokenizer is saved beside the sparse model, and what it puts before a text (`prefix_ids`) is
    written into the manifest. Raises ValueError where the dense model has no tokenizer, and for
    blocks that do not begin with that prefix.

    >>> import tempfile
    >>> from bridges import load_run, save_run
    >>> run = load_run("tiny")
    >>> text = dict(heldout=run.heldout(), means_from=run.heldout()[:2])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = save_run(folder, run.dense, run.sparse, run.bridges, **text, facts={})
    >>> again.bridges.config == run.bridges.config
    True
    """
    folder = Path(folder)
    if dense.tokenizer is None:
        raise ValueError(
            "save_run: the dense model has no tokenizer, so the run could not be used without it; "
            "open it with DenseModel(model, tokenizer)"
        )
    prefix = prefix_ids(dense.tokenizer)
    check_begin(heldout, prefix, "save_run: heldout")
    check_begin(means_from, prefix, "save_run: means_from")
    sparse.save_pretrained(folder / "sparse")
    dense.tokenizer.save_pretrained(folder / "sparse")
    means = node_means(sparse, means_from, where=bridges.ordinary_tokens(dense, means_from))
    save_means(folder / "sparse", means, sparse.fingerprint())
    bridges.dense_fingerprint = dense.fingerprint
    bridges.sparse_fingerprint = sparse.fingerprint()
    bridges.save(folder / "bridges")
    texts = {"blocks": heldout.contiguous()}
    texts |= {"token_counts": _counts(token_counts, means_from, dense.vocab_size, prefix)}
    replace_files(folder, {"heldout.safetensors": save(texts)})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dense": {"name": str(dense.name), "fingerprint": dense.fingerprint},
        "sparse": {"fingerprint": sparse.fingerprint()},
        "prefix": {
            "ids": list(prefix),
            "tokens": dense.tokenizer.convert_ids_to_tokens(list(prefix)),
        },
        "versions": {"python": python_version()} | {name: version(name) for name in PACKAGES},
        **facts,
    }
    replace_files(folder, {"manifest.json": json.dumps(manifest, indent=1)})
    return load_run(folder, dense)


def _counts(
    given: Tensor | None, text: Tensor, vocab_size: int, prefix: tuple[int, ...]
) -> Int[Tensor, " vocab"]:
    """Return the counts of all tokens of the dense model, those that the tokenizer lacks as 0."""
    counts = count_tokens(text, vocab_size, prefix) if given is None else given
    if len(counts) > vocab_size:
        raise ValueError(
            f"save_run: token_counts has {len(counts)} tokens and the dense model {vocab_size}; "
            "count with the dense model's own tokenizer"
        )
    return torch.nn.functional.pad(counts, (0, vocab_size - len(counts)))


def load_run(folder: str | Path, dense: DenseModel | str | None = None) -> Run:
    """Open a run folder and return its models, bridges and tokenizer.

    `dense` is the dense model, or its name or folder; by default the one that the manifest names,
    which is opened when `Run.dense` is first asked for. A dense model that is opened here gets the
    run's tokenizer, so that both models share it. One whose config shows that it does not fit is
    refused before it is opened. The folder "tiny" is the built-in run (its card:
    bridges/tiny_run/README.md), which is never written to.

    Raises ValueError where a file is missing or broken, and where the fingerprint of the dense
    model is not that of the model the bridges were trained with. Raises it too where the tokenizer
    of the run, or that of the `dense` that was passed, puts other special tokens before a text than
    the run was trained with.

    >>> from bridges import load_run
    >>> run = load_run("tiny")  # the built-in run; else a folder
    >>> run.dense.n_sites, run.sparse.n_sites, len(run.circuits()["single_double_quote"])
    (5, 5, 71)
    """
    builtin = str(folder) == "tiny"
    folder = TINY if builtin else Path(folder)
    manifest = _manifest(folder)
    sparse, tokenizer = _twin(folder / "sparse")
    _check_own_tokenizer(folder, tokenizer, _prefix_of(manifest))
    bridges = BridgeSet.load(folder / "bridges")
    bridges.check_sparse(sparse)

    @cache
    def open_dense() -> DenseModel:
        if isinstance(dense, DenseModel):
            check_prefix(folder, dense)
            opened = dense
        else:
            name = dense or manifest["dense"]["name"]
            bridges.check_dense_config(config_of(name), sparse)
            opened = DenseModel.from_pretrained(name)
            opened.tokenizer = tokenizer
        bridges.check_dense(opened)
        return opened

    if dense is not None:
        device = open_dense().device
        sparse, bridges = sparse.to(device), bridges.to(device)  # pyright: ignore
    return Run(
        folder=folder,
        output=Path("runs/tiny") if builtin else folder,
        open_dense=open_dense,
        sparse=sparse,
        bridges=bridges,
        tokenizer=tokenizer,
        manifest=manifest,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a run says. Raises ValueError where it cannot be read."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no run folder: {path.name} is missing; pass the --output_dir of "
            "examples/train_bridge.py after it has finished training"
        )
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # no JSON, no text, or no object
        raise ValueError(f"{path} is broken ({error}); {RESTORE}") from error
    if (found := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {found}, this library reads {SCHEMA_VERSION}; update the "
            "library or train again"
        )
    return manifest


def _twin(folder: Path) -> tuple[SparseGPT, Any]:
    """Return the sparse model in `folder` and the tokenizer beside it.

    Raises ValueError, naming the folder, where a file there is missing or broken.
    """
    if not (folder / "config.json").is_file():  # transformers would go on with the defaults
        raise ValueError(f"config.json of {folder} is missing; {RESTORE}")
    try:
        return SparseGPT.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"a file in {folder} is broken ({error}); {RESTORE}") from error


def _prefix_of(manifest: dict[str, Any]) -> tuple[int, ...]:
    """Return the prefix that a run was made with; runs from before it was recorded had none."""
    return tuple(manifest["prefix"]["ids"]) if "prefix" in manifest else ()


def check_prefix(folder: Path, dense: DenseModel) -> None:
    """Raise ValueError where the tokenizer of `dense` puts another prefix before a text than a run.

    `folder` is that of the run. Nothing is checked where it has no manifest, or `dense` has no
    tokenizer.
    """
    path = folder / "manifest.json"
    if dense.tokenizer is not None and path.is_file():
        remedy = f"take load_run({str(folder)!r}).dense, which has the run's tokenizer"
        want = _prefix_of(json.loads(path.read_text()))
        _check_tokenizer(dense.tokenizer, want, f"the dense model {dense.name}", remedy)


def _check_own_tokenizer(folder: Path, tokenizer: Any, want: tuple[int, ...]) -> None:
    """Raise ValueError where the tokenizer in a run puts another prefix before a text."""
    at = str(folder / "sparse")
    remedy = f"restore the tokenizer's files in {at}"
    if not want:
        remedy = (
            f"tokenizer = AutoTokenizer.from_pretrained({at!r}); tokenizer.add_bos_token = False; "
            f"tokenizer.save_pretrained({at!r}). Or train again, with these tokens"
        )
    _check_tokenizer(tokenizer, want, at, remedy)


def _check_tokenizer(tokenizer: Any, want: tuple[int, ...], whose: str, remedy: str) -> None:
    def shown(ids: tuple[int, ...]) -> str:
        return f"{tokenizer.convert_ids_to_tokens(list(ids))}" if ids else "nothing"

    if (adds := prefix_ids(tokenizer)) != want:
        raise ValueError(
            f"the tokenizer of {whose} puts {shown(adds)} before a text, but the run was trained "
            f"with {shown(want)}; {remedy}"
        )


def run_folder(circuit: Circuit, remedy: str) -> Path:
    """Return the folder of the sparse model that a circuit came from.

    Raises ValueError where the circuit does not know its folder, or the folder is not there.
    `remedy` is the argument that the message tells the caller to pass instead.
    """
    if circuit.source is None:
        raise ValueError(
            f"the circuit for {circuit.task.name} does not know which run it came from; pass "
            f"{remedy}, or prune a model that was saved to a run folder"
        )
    if not Path(circuit.source.folder).is_dir():
        raise ValueError(
            f"the circuit for {circuit.task.name} came from {circuit.source.folder}, which is not "
            f"there; pass {remedy}, or restore the folder"
        )
    return Path(circuit.source.folder)
