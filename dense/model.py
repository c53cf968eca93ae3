"""A dense Hugging Face language model, read and restarted at its residual sites.

    ids   Int[batch pos]
    h[s]  Float[batch pos d_dense]      the residual at site s = 0 .. n_sites-1
    y     Float[batch pos vocab]        logits

Every run is one forward of the family's own code, in which some blocks are twins (twin.py): they
record the stream, hand it through, or put another one in its place. Masks, rotary tables, the
final norm, soft-caps and scalings are therefore the model's own.
"""

import hashlib
import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dense.load import TINY, load, refuse_unsuitable
from dense.proof import prove
from dense.sites import Layout, probe, probe_ids
from dense.twin import (
    Blank,
    answer,
    deep_twin,
    first,
    forwarding,
    replaced,
    site_block,
    take_hidden,
    transplanted,
)

_SHAPING = (  # config fields that, with the weights, decide the function; absent ones count as None
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim intermediate_size n_inner max_position_embeddings hidden_act activation_function "
    "layer_norm_epsilon layer_norm_eps rms_norm_eps sliding_window layer_types"
).split()


class DenseModel:
    """A causal language model with its residual sites found and proven.

    Accepts any loaded `PreTrainedModel` that generates text from one residual stream. The model
    is put into eval mode and its parameters stop requiring gradients: it is read, never trained.
    Nothing else on it is changed. Raises SiteError, with what was seen, if the sites of this very
    model cannot be found or restarting at one of them is not exact.

    Site 0 is after the embeddings, 2i+1 after attention i, 2i+2 after MLP i. If `has_mid` is
    False (parallel or post-norm blocks) there is no stream between attention and MLP, and site
    i+1 is after block i.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, name: str | None = None) -> None:
        refuse_unsuitable(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        path = getattr(model.config, "_name_or_path", "")
        self.name = name or ("tiny" if path == str(TINY) else path) or self.model_type
        self.layout: Layout = probe(model)
        self._forward_takes = set(inspect.signature(type(model).forward).parameters)
        self._passing = [forwarding(b, self._pass) for b in self.layout.blocks]
        ids = probe_ids(self.model)[:1].expand(self.n_sites, -1)
        prove(self.model, self.layout, self.residuals(ids), self.resume)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **kwargs: Any) -> "DenseModel":
        """Open "tiny" (built in), a saved folder, or a name on the Hugging Face hub.

        `kwargs` go to transformers; weights are read as fp32 unless `dtype` says otherwise. What
        is on this machine is not fetched again. Errors: see `load`.
        """
        name = str(name_or_folder)
        if revision := kwargs.get("revision"):
            name += f"@{revision}"
        model, tokenizer = load(name_or_folder, **kwargs)
        return cls(model, tokenizer, name=name)

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
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the weights and of the config fields that decide the function.

        Covers every parameter's name, dtype, shape and bytes; not buffers, names or paths.
        Computed anew each time it is asked for.
        """
        config = self.model.config.get_text_config()
        digest = hashlib.sha256()
        for field in _SHAPING:
            digest.update(f"{field}={getattr(config, field, None)}\n".encode())
        for name, p in sorted(self.model.named_parameters()):
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # running it

    def inputs(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Any]:
        """Return the keyword arguments with which the model is called here.

        With a mask, positions count the real tokens, so that a row padded on the left answers as
        it does alone. Never with a cache. Raises ValueError for ids that the model cannot embed.
        """
        self._check_eval()
        self._check_ids(ids)
        kwargs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
            if "position_ids" in self._forward_takes:
                kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return kwargs

    def logits(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of the plain model."""
        return self.model(**self.inputs(ids, attention_mask)).logits

    def residuals(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> list[Float[Tensor, "batch pos d_dense"]]:
        """Return [h_0 .. h_last], the residual at every site in depth order.

        Without gradient: the model is frozen and nothing before site 0 can carry one.
        """
        return self._read(ids, attention_mask, every_position=False)[0]

    def residuals_and_logits(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> tuple[list[Float[Tensor, "batch pos d_dense"]], Float[Tensor, "batch pos vocab"]]:
        """Return the residual at every site and the logits, from one forward."""
        return self._read(ids, attention_mask, every_position=True)

    def resume(
        self,
        site: int,
        h: Float[Tensor, "..."],
        ids: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits when the residual at `site` is `h`.

            resume(s, h_s, ids) = logits(ids)    for every site s

        Nothing before the site is computed: `ids` give positions and masks alone, their embedding
        is not looked up. Gradients flow to `h`. Raises ValueError for a site or an `h` that the
        model does not have.
        """
        self._check_site(site)
        self._check_residual(h, ids)
        k, mid = divmod(site, 2) if self.has_mid else (site, 0)
        last = k == self.n_layers
        k = min(k, self.n_layers - 1)

        def inject(*args: Any, **kwargs: Any) -> Any:
            _, args, kwargs = take_hidden(args, kwargs)
            if last:
                return answer(h, self.layout.arity)
            block = self.layout.halves[k][1] if mid else self.layout.blocks[k]
            return block(h, *args, **kwargs)

        parts = {f"{self.layout.path}.{j}": self._passing[j] for j in range(k)}
        parts[f"{self.layout.path}.{k}"] = forwarding(self.layout.blocks[k], inject)
        parts[self._embedding[0]] = self._embedding[1]
        return replaced(self.model, parts)(**self.inputs(ids, attention_mask)).logits

    def hookable(self) -> nn.Module:
        """Return a twin of the model with an identity module at every site (`site_path`).

        It shares every weight and gives the same logits bit for bit. Torch hooks and nnsight read
        and replace the residual as the output of those modules; none of it reaches the original.
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

    def site_path(self, site: int) -> str:
        """Return the dotted path, in the hookable twin, of the module whose output is the site."""
        self._check_site(site)
        k, mid = divmod(site, 2) if self.has_mid else (site, 0)
        if k == self.n_layers:
            return f"{self.layout.path}.{k - 1}.resid_post"
        return f"{self.layout.path}.{k}.{'resid_mid' if mid else 'resid_pre'}"

    def describe(self) -> str:
        """Return one line: family, depth, sites and why there are so many."""
        why = {
            "sequential": "after the embeddings, each attention and each MLP",
            "parallel": "after the embeddings and each block: attention and MLP read the same "
            "stream in parallel, so there is none between them",
            "post-norm": "after the embeddings and each block: the blocks normalise the stream "
            "itself, so there is no plain one between attention and MLP",
        }[self.layout.composition]
        return (
            f"{self.name} ({self.model_type}): {self.n_layers} layers, {self.n_sites} residual "
            f"sites of width {self.d_resid}, {why}"
        )

    __repr__ = describe

    # how

    @torch.no_grad()
    def _read(
        self, ids: Tensor, attention_mask: Tensor | None, every_position: bool
    ) -> tuple[list[Tensor], Tensor]:
        stream: list[Tensor] = []
        parts = {
            f"{self.layout.path}.{k}": self._recording(k, stream) for k in range(self.n_layers)
        }
        kwargs = self.inputs(ids, attention_mask)
        if not every_position and "logits_to_keep" in self._forward_takes:
            kwargs["logits_to_keep"] = 1
        logits = replaced(self.model, parts)(**kwargs).logits
        return stream, logits

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a block that is not run."""
        return answer(take_hidden(args, kwargs)[0], self.layout.arity)

    def _recording(self, k: int, stream: list[Tensor]) -> nn.Module:
        """Return a twin of block `k` that appends to `stream` the residual at its sites."""
        block = self.layout.blocks[k]

        def forward(*args: Any, **kwargs: Any) -> Any:
            h, args, kwargs = take_hidden(args, kwargs)
            stream.append(h)
            if self.has_mid:
                attn_half, mlp_half = self.layout.halves[k]
                stream.append(first(attn_half(h, *args, **kwargs)))
                out = mlp_half(stream[-1], *args, **kwargs)
            else:
                out = block(h, *args, **kwargs)
            if k == self.n_layers - 1:
                stream.append(first(out))
            return out

        return forwarding(block, forward)

    @cached_property
    def _embedding(self) -> tuple[str, nn.Module]:
        """Path of the token embedding, and the stand-in for runs that do not need its output."""
        found = self.model.get_input_embeddings()
        path = next(p for p, m in self.model.named_modules() if m is found)
        return path, Blank(found)

    def _check_eval(self) -> None:
        if self.model.training:
            raise ValueError(
                f"{self.model_type} was put into train mode after it was opened; its residuals "
                "would depend on dropout. Call model.eval()"
            )

    def _check_ids(self, ids: Tensor) -> None:
        n_embedded = self.model.get_input_embeddings().weight.shape[0]
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids must be (batch, pos) and not empty, got {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= n_embedded:
            raise ValueError(
                f"ids range over {ids.min().item()}..{ids.max().item()}, but {self.model_type} "
                f"embeds 0..{n_embedded - 1}; were they made by another model's tokenizer?"
            )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(
                f"ids have {ids.shape[1]} positions, but {self.model_type} was built for at most "
                f"{limit}; shorten or split them"
            )

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
