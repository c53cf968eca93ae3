"""Linear maps between the residual streams of a dense model and its weight-sparse twin.

    encode:  z_hat = AbsTopK_k(E_s (h - mu_s) / sigma_s + c_s)          dense to sparse
    decode:  h_hat = mu_s + sigma_s (D_s z + m_s)                       sparse to dense

h is the residual of the dense model at its site s, and z that of the twin at the sparse site to
which s is bridged (`BridgeConfig`). A bridge is named by its dense site s. E_s, c_s and D_s, m_s
are trained. mu_s, the mean of h, and sigma_s, its root mean square about the mean (one number per
site), are measured once at the start, because dense sites differ in scale tenfold (Gao et al. 2025,
section 3.3; docs/method.md#bridge-maps; docs/bridge-study compares with raw residuals). AbsTopK_k
keeps the k entries of largest size and sets the others to 0.

    outlying    |h_s| > limit_s,   limit_s = m * median |h_s|        a token at site s (m = 4)

A pretrained model has attention sinks: a few tokens, the first of a text above all, whose residual
is a hundred times as long as the others' and carries nearly all the variance of a site. A map that
knows only which tokens these are would look better than any bridge. So they are left out of mu and
sigma, of the errors of the bridges and of node means, and they are passed through: where a stream
crosses a bridge, and where a change is carried over, an outlying token keeps the residual that its
own model has there (docs/method.md#outlying-tokens). limit_s is infinite at a site where
calibration saw none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridges.losses.moments import Moments
from bridges.protocol import ResidualModel, fingerprint
from dense.outlying import TIMES, lengths, limit_of
from sparse.ops.abs_topk import abs_topk
from sparse.storage.checkpoint import read_folder, write_folder
from sparse.storage.records import checked

from .site_map import even_sites


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeConfig:
    """The shape of a bridge set: widths, and which dense site is bridged to which sparse site.

    A site is a place in a model's residual stream, counted from 0 in depth order by that model
    alone: 0 is after the embeddings, the last is before the final norm. With L layers there are
    2L+1 (2i+1 after attention i, 2i+2 after MLP i), or L+1 where a dense model has no stream
    between attention and MLP (i+1 after block i). The two models may number theirs differently:

        dense, 4 layers     0  1  2  3  4  5  6  7  8        sites        = (0, 2, 4, 6, 8)
        sparse, 2 layers    0     1     2     3     4        sparse_sites = (0, 1, 2, 3, 4)

    Bridge i joins dense site sites[i] and sparse site sparse_sites[i]. Every method names it by its
    dense site: here `encode(4, h)` takes the dense residual at site 4 to sparse site 2. The config
    is saved beside the weights of the bridges and checked when they are loaded.
    """

    d_dense: int
    """Width of the dense model's residual stream."""
    d_sparse: int
    """Width of the sparse model's residual stream."""
    n_dense_sites: int
    """Residual sites of the dense model."""
    n_sparse_sites: int
    """Residual sites of the sparse model."""
    k: int
    """Entries an encoder keeps in each sparse vector, 1..d_sparse."""
    sites: tuple[int, ...] = ()
    """The bridged dense sites, ascending. By default those of `even_sites`: all sites of the model
    that has fewer, spread evenly over the sites of the other. Where both models have equally many
    sites, these are all of them."""
    sparse_sites: tuple[int, ...] = ()
    """The sparse site of each bridge, ascending too, so that no two bridges share one. By default
    the partners that `even_sites` gives: the same numbers where both models have equally many
    sites."""
    outlying: float = TIMES
    """m: how many times as long as the median of its site a residual must be for its token to be
    outlying there. 0: no token is."""

    def __post_init__(self) -> None:
        for name in ("d_dense", "d_sparse", "n_dense_sites", "n_sparse_sites", "k"):
            object.__setattr__(self, name, _ints(name, (getattr(self, name),))[0])
            if name != "k" and getattr(self, name) < 1:
                raise ValueError(f"BridgeConfig.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.k <= self.d_sparse:
            raise ValueError(f"BridgeConfig.k={self.k} is outside 1..d_sparse={self.d_sparse}")
        if not (self.outlying == 0 or 1 < self.outlying < math.inf):
            raise ValueError(
                f"BridgeConfig.outlying={self.outlying} must be above 1, or 0 for no outlying token"
            )
        sites, sparse_sites = _ints("sites", self.sites), _ints("sparse_sites", self.sparse_sites)
        if not sparse_sites:
            even = even_sites(self.n_dense_sites, self.n_sparse_sites)
            sites = sites or tuple(even)
            _check_sites("sites", sites, self.n_dense_sites)
            if alone := [s for s in sites if s not in even]:
                raise ValueError(
                    f"BridgeConfig.sites={sites}: dense sites {alone} have no partner in the even "
                    f"map {even} (dense: sparse); name theirs too, as sparse_sites or in a dict"
                )
            sparse_sites = tuple(even[s] for s in sites)
        _check_sites("sites", sites, self.n_dense_sites)
        _check_sites("sparse_sites", sparse_sites, self.n_sparse_sites)
        if len(sites) != len(sparse_sites):
            raise ValueError(
                f"BridgeConfig: {len(sites)} sites {sites} but {len(sparse_sites)} sparse_sites "
                f"{sparse_sites}; give every dense site one sparse site"
            )
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "sparse_sites", sparse_sites)

    @property
    def pairs(self) -> dict[int, int]:
        """The bridges as {dense site: sparse site}, ascending."""
        return dict(zip(self.sites, self.sparse_sites, strict=True))

    @classmethod
    def between(
        cls,
        dense: ResidualModel,
        sparse: ResidualModel,
        k: int,
        sites: Mapping[int, int] | tuple[int, ...] = (),
        sparse_sites: tuple[int, ...] = (),
        outlying: float = TIMES,
    ) -> BridgeConfig:
        """Return the config for bridges between two models, of whatever depths and widths.

        `sites` is either a map {dense site: sparse site}, such as {0: 0, 4: 2, 8: 4} or the `sites`
        that `fit_sites` found, or the dense sites alone. In the second case their partners are
        `sparse_sites`, or by default those of the even map (`even_sites`).
        """
        if isinstance(sites, Mapping):
            if sparse_sites:
                raise ValueError(
                    f"BridgeConfig.between: sites={dict(sites)} names the sparse sites already; "
                    "leave sparse_sites out"
                )
            pairs = sorted(sites.items(), key=lambda pair: _ints("sites", pair))
            sites, sparse_sites = tuple(d for d, _ in pairs), tuple(s for _, s in pairs)
        return cls(
            d_dense=dense.d_resid,
            d_sparse=sparse.d_resid,
            n_dense_sites=dense.n_sites,
            n_sparse_sites=sparse.n_sites,
            k=k,
            sites=sites,
            sparse_sites=sparse_sites,
            outlying=outlying,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BridgeConfig:
        """Return the config with these saved fields; raise ValueError for an unknown one."""
        values = checked(cls, values, "BridgeConfig")
        lists = {name: tuple(values.get(name, ())) for name in ("sites", "sparse_sites")}
        return cls(**{**values, **lists})


def _ints(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Return whole numbers of any library as plain ints, which can be saved and compared.

    Raises ValueError for a number that is not whole.
    """
    values = tuple(values)
    try:
        return tuple(map(index, values))
    except TypeError as error:
        raise ValueError(f"BridgeConfig.{name}: {values} must be whole numbers") from error


def _check_sites(name: str, sites: tuple[int, ...], n: int) -> None:
    if list(sites) != sorted(set(sites)) or not sites or not 0 <= sites[0] <= sites[-1] < n:
        raise ValueError(
            f"BridgeConfig.{name}={sites} must ascend within 0..{n - 1}, each site once"
        )


class BridgeSet(nn.Module):
    """An encoder and a decoder for every bridge; methods name a bridge by its dense site."""

    def __init__(self, config: BridgeConfig, seed: int = 0) -> None:
        """Start with E ~ N(0, 0.09/d_dense), D ~ N(0, 1/d_sparse), biases 0, mu = 0, sigma = 1.

        No token is outlying before calibration.
        """
        super().__init__()
        self.config = config
        self.dense_fingerprint: str | None = None
        self.sparse_fingerprint: str | None = None
        n, d_dense, d_sparse = len(config.sites), config.d_dense, config.d_sparse
        rng = torch.Generator().manual_seed(seed)
        self.encoders = nn.ModuleList(nn.Linear(d_dense, d_sparse) for _ in range(n))
        self.decoders = nn.ModuleList(nn.Linear(d_sparse, d_dense) for _ in range(n))
        for layers, std in ((self.encoders, 0.3 / d_dense**0.5), (self.decoders, d_sparse**-0.5)):
            for layer in layers:
                nn.init.normal_(layer.weight, 0.0, std, generator=rng)  # pyright: ignore
                nn.init.zeros_(layer.bias)  # pyright: ignore
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(n, d_dense))
        self.register_buffer("scale", torch.ones(n))
        self.limit: Tensor
        self.register_buffer("limit", torch.full((n,), math.inf))
        self._limits: tuple[tuple[int, int], tuple[float, ...]] = ((0, -1), ())

    def index(self, site: int) -> int:
        """Return the place of dense `site` among the bridged ones."""
        if site not in self.config.sites:
            raise ValueError(
                f"site {site} is not bridged; the bridged sites of the dense model are "
                f"{list(self.config.sites)}"
            )
        return self.config.sites.index(site)

    def encode(
        self, site: int, h: Float[Tensor, "*batch d_dense"]
    ) -> Float[Tensor, "*batch d_sparse"]:
        """Return the encoder's prediction of the sparse residual from the dense residual `h`.

        `h` is taken at dense `site`. The prediction is for the sparse site `config.pairs[site]`
        and has at most k nonzero entries per token.
        """
        i = self.index(site)
        x = (h - self.mean[i]) / self.scale[i]
        return abs_topk(self.encoders[i](x), self.config.k)

    def decode(
        self, site: int, z: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch d_dense"]:
        """Return the decoder's prediction of the dense residual from the sparse residual `z`.

        `z` is taken at the sparse site `config.pairs[site]`; the prediction is for dense `site`.
        """
        i = self.index(site)
        return self.mean[i] + self.scale[i] * self.decoders[i](z)

    def transport(
        self, site: int, delta: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch d_dense"]:
        """Return what a change of the sparse residual adds to the dense one: sigma_s D_s delta.

        It equals decode(z + delta) - decode(z) for any z, since the decoder is affine.
        """
        i = self.index(site)
        return self.scale[i] * nn.functional.linear(delta, self.decoders[i].weight)  # pyright: ignore

    def limits(self) -> dict[int, float]:
        """Return, by dense site, the length of a residual above which its token is outlying there.

        It is infinite where no token is. The numbers are read from the device once, and again
        after they were changed.
        """
        known = (id(self.limit), self.limit._version)
        if self._limits[0] != known:
            self._limits = known, tuple(self.limit.tolist())
        return dict(zip(self.config.sites, self._limits[1], strict=True))

    def ordinary(
        self, site: int, h: Float[Tensor, "*batch d_dense"]
    ) -> Bool[Tensor, "*batch"] | None:
        """Return which tokens are not outlying at dense `site`; None where no limit is known."""
        i = self.index(site)
        if math.isinf(self.limits()[site]):
            return None
        return lengths(h) <= self.limit[i]

    @torch.no_grad()
    def ordinary_tokens(
        self, dense: ResidualModel, blocks: Int[Tensor, "block pos"], batch_size: int = 16
    ) -> Bool[Tensor, "block pos"] | None:
        """Return which tokens of a text are outlying at no bridged site; None: no limit is known.

        The dense model is run on them, `batch_size` blocks at a time.
        """
        limited = [site for site, limit in self.limits().items() if math.isfinite(limit)]
        if not limited:
            return None
        found = []
        for ids in blocks.split(batch_size):
            h = dense.residuals(ids.to(self.limit.device))
            masks = [lengths(h[s]) <= self.limits()[s] for s in limited]
            found.append(torch.stack(masks).all(0).to(blocks.device))
        return torch.cat(found)

    @torch.no_grad()
    def calibrate(self, residuals: Sequence[Float[Tensor, "batch pos d_dense"]]) -> None:
        """Set limits, mu and sigma from the dense residuals at every dense site, bridged or not."""
        self.set_limits(residuals)
        self.centre(self.moments(residuals))

    @torch.no_grad()
    def set_limits(self, residuals: Sequence[Float[Tensor, "batch pos d_dense"]]) -> None:
        """Set limit_s = m * median |h_s|, or infinity where no token of these is longer."""
        for i, site in enumerate(self.config.sites):
            self.limit[i] = limit_of(residuals[site], self.config.outlying)

    @torch.no_grad()
    def moments(self, residuals: Sequence[Float[Tensor, "batch pos d_dense"]]) -> list[Moments]:
        """Return the moments of the dense residuals at every dense site, over ordinary tokens."""
        bridged = self.config.sites
        return [
            Moments.of(h, self.ordinary(site, h) if site in bridged else None)
            for site, h in enumerate(residuals)
        ]

    @torch.no_grad()
    def centre(self, moments: Sequence[Moments]) -> None:
        """Set mu_s and sigma_s from the moments of the dense residuals at every dense site."""
        for i, site in enumerate(self.config.sites):
            n, mean, spread = moments[site]
            self.mean[i] = mean
            self.scale[i] = (spread / (n * len(mean))).sqrt().clamp(min=1e-6)

    def check(self, dense: ResidualModel, sparse: ResidualModel) -> None:
        """Raise ValueError unless these bridges fit the two models and were trained with them.

        They fit where the numbers of sites and the widths agree. Bridges that were trained know the
        fingerprints of their models, and these must agree too.
        """
        self.check_dense(dense)
        self.check_sparse(sparse)

    def check_dense(self, model: ResidualModel) -> None:
        """Raise ValueError unless these bridges fit the dense model, as `check` says."""
        c = self.config
        _check_side("dense", model, (c.n_dense_sites, c.d_dense), self.dense_fingerprint)

    def check_sparse(self, model: ResidualModel) -> None:
        """Raise ValueError unless these bridges fit the sparse model, as `check` says."""
        c = self.config
        _check_side("sparse", model, (c.n_sparse_sites, c.d_sparse), self.sparse_fingerprint)

    def check_dense_config(self, config: Any, sparse: ResidualModel) -> None:
        """Raise ValueError where the dense model of a Hugging Face config cannot fit.

        This needs no model, and so it can be told before the dense model is opened, which takes
        long. `check` looks at the model itself.
        """
        c, of = self.config, config.get_text_config()
        n, width = of.num_hidden_layers, of.hidden_size
        if c.n_dense_sites not in (n + 1, 2 * n + 1) or c.d_dense != width:
            raise ValueError(
                f"the dense model has {n} layers, so {n + 1} or {2 * n + 1} sites, of width "
                f"{width}, but these bridges were made for {c.n_dense_sites} sites of width "
                f"{c.d_dense}; load the dense model they were trained with, or train new ones"
            )
        if of.vocab_size != sparse.vocab_size:
            raise ValueError(
                f"the dense model has {of.vocab_size} tokens and the sparse one "
                f"{sparse.vocab_size}; load the dense model whose tokenizer they share"
            )

    def save(self, folder: str | Path) -> None:
        """Write a folder with the weights in safetensors and config and fingerprints in JSON."""
        state = {
            "config": asdict(self.config),
            "dense_fingerprint": self.dense_fingerprint,
            "sparse_fingerprint": self.sparse_fingerprint,
        }
        write_folder(Path(folder), {"bridges": self.state_dict()}, state)

    @classmethod
    def load(cls, folder: str | Path) -> BridgeSet:
        """Return the bridges that `save` wrote; raise ValueError where the files do not agree."""
        tensors, state = read_folder(Path(folder), "bridges")
        try:
            bridges = cls(BridgeConfig.from_dict(state["config"]))
            # bridges from before outlying tokens were told apart were trained on all tokens
            bridges.load_state_dict({"limit": bridges.limit} | tensors["bridges"])
            bridges.dense_fingerprint = state["dense_fingerprint"]
            bridges.sparse_fingerprint = state["sparse_fingerprint"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"state.json and bridges.safetensors in {folder} do not belong together ({error}); "
                "restore the folder, or train again"
            ) from error
        return bridges


def _check_side(
    side: str, model: ResidualModel, made_for: tuple[int, int], expected: str | None
) -> None:
    """Raise ValueError unless a model has the sites, the width and the fingerprint of a side."""
    n, width = made_for
    if (model.n_sites, model.d_resid) != made_for:
        raise ValueError(
            f"the {side} model has {model.n_sites} sites of width {model.d_resid}, but these "
            f"bridges were made for {n} sites of width {width}; load the {side} model they were "
            "trained with, or train new ones"
        )
    if expected is not None and (found := fingerprint(model)) != expected:
        raise ValueError(
            f"the {side} model's weights (fingerprint {found}) are not those these bridges were "
            f"trained with ({expected}); load that {side} model, or train new bridges"
        )


def through(
    crossing: Float[Tensor, "*batch d"],
    ordinary: Bool[Tensor, "*batch"] | None,
    own: Float[Tensor, "*batch d"],
) -> Float[Tensor, "*batch d"]:
    """Return the residuals that cross a bridge, with a model's `own` ones at outlying tokens."""
    return crossing if ordinary is None else torch.where(ordinary[..., None], crossing, own)
