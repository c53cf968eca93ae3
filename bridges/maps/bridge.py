"""Linear maps between the residual streams of a dense model and its weight-sparse twin.

    encode:  z_hat = AbsTopK_k(E_s (h - mu_s) / sigma_s + c_s)          dense to sparse
    decode:  h_hat = mu_s + sigma_s (D_s z + m_s)                       sparse to dense

mu_s is the mean and sigma_s the root mean square about it (one number per site) of the dense
residual, taken from data once at the start, because dense sites differ in scale tenfold (Gao et al.
2025, section 3.3; docs/method.md#bridge-maps; docs/bridge-study compares with raw residuals). s is
a site of the dense model, by which a bridge is known; z is the sparse residual at the sparse site
it is bridged to (`BridgeConfig`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.losses.moments import Moments
from bridges.protocol import ResidualModel, fingerprint
from sparse.ops.abs_topk import abs_topk
from sparse.storage.checkpoint import read_folder, write_folder
from sparse.storage.records import checked

from .site_map import even_sites


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeConfig:
    """The shape of one bridge set: which dense site is bridged to which sparse one, and widths.

    A site is a place in a model's residual stream, counted from 0 in depth order by that model
    alone: 0 is after the embeddings, the last is before the final norm. With L layers there are
    2L+1 (2i+1 after attention i, 2i+2 after MLP i), or L+1 where a dense model has no stream
    between attention and MLP (i+1 after block i). The two models may number theirs differently:

        dense, 4 layers     0  1  2  3  4  5  6  7  8        sites        = (0, 2, 4, 6, 8)
        sparse, 2 layers    0     1     2     3     4        sparse_sites = (0, 1, 2, 3, 4)

    Bridge i joins dense site sites[i] and sparse site sparse_sites[i]. It is known by its dense
    site: `encode(4, h)` takes the dense residual at site 4 to sparse site 2. Saved next to the
    weights and checked on load.
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
    """The bridged dense sites in ascending order. By default as many as the model with fewer sites
    has, spread evenly over the other's (`even_sites`): all of both where they have equally many."""
    sparse_sites: tuple[int, ...] = ()
    """The sparse site of each, ascending too, so that no two bridges share one. By default the
    partners that `even_sites` gives: the same sites where both models have equally many."""

    def __post_init__(self) -> None:
        for name in ("d_dense", "d_sparse", "n_dense_sites", "n_sparse_sites", "k"):
            object.__setattr__(self, name, _ints(name, (getattr(self, name),))[0])
            if name != "k" and getattr(self, name) < 1:
                raise ValueError(f"BridgeConfig.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.k <= self.d_sparse:
            raise ValueError(f"BridgeConfig.k={self.k} is outside 1..d_sparse={self.d_sparse}")
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
    ) -> BridgeConfig:
        """Return the config for bridges between two models, of whatever depths and widths.

        `sites` is a map {dense site: sparse site}, such as {0: 0, 4: 2, 8: 4} or what `fit_sites`
        found; or the dense sites alone, whose partners are `sparse_sites` or, without these, those
        of the even map.
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
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BridgeConfig:
        """Build from saved fields; an unknown one is an error."""
        values = checked(cls, values, "BridgeConfig")
        lists = {name: tuple(values.get(name, ())) for name in ("sites", "sparse_sites")}
        return cls(**{**values, **lists})


def _ints(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Plain ints of numbers of whatever library, which can be saved and compared."""
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
        """E ~ N(0, 0.09/d_dense), D ~ N(0, 1/d_sparse), biases 0, mu = 0, sigma = 1."""
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
        """Return the sparse residual, k of its entries nonzero, that stands for dense `h`.

        It belongs to the sparse site `config.pairs[site]`.
        """
        i = self.index(site)
        x = (h - self.mean[i]) / self.scale[i]
        return abs_topk(self.encoders[i](x), self.config.k)

    def decode(
        self, site: int, z: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch d_dense"]:
        """Return the dense residual that stands for sparse residual `z`."""
        i = self.index(site)
        return self.mean[i] + self.scale[i] * self.decoders[i](z)

    def transport(
        self, site: int, delta: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch d_dense"]:
        """Return what a sparse change adds to the dense residual: sigma_s D_s delta."""
        i = self.index(site)
        return self.scale[i] * nn.functional.linear(delta, self.decoders[i].weight)  # pyright: ignore

    @torch.no_grad()
    def calibrate(self, residuals: Sequence[Float[Tensor, "batch pos d_dense"]]) -> None:
        """Set mu_s and sigma_s from the dense residuals at every dense site, bridged or not."""
        self.centre([Moments.of(h) for h in residuals])

    @torch.no_grad()
    def centre(self, moments: Sequence[Moments]) -> None:
        """Set mu_s and sigma_s from the moments of the dense residuals at every site."""
        for i, site in enumerate(self.config.sites):
            n, mean, spread = moments[site]
            self.mean[i] = mean
            self.scale[i] = (spread / (n * len(mean))).sqrt().clamp(min=1e-6)

    def check(self, dense: ResidualModel, sparse: ResidualModel) -> None:
        """Raise unless these bridges fit between, and belong to, `dense` and `sparse`."""
        c = self.config
        for side, model, n, width in (
            ("dense", dense, c.n_dense_sites, c.d_dense),
            ("sparse", sparse, c.n_sparse_sites, c.d_sparse),
        ):
            if (model.n_sites, model.d_resid) != (n, width):
                raise ValueError(
                    f"the {side} model has {model.n_sites} sites of width {model.d_resid}, but "
                    f"these bridges were made for {n} sites of width {width}; load the "
                    f"{side} model they were trained with, or train new ones"
                )
        mine = (
            ("dense", dense, self.dense_fingerprint),
            ("sparse", sparse, self.sparse_fingerprint),
        )
        for side, model, expected in mine:
            if expected is not None and (found := fingerprint(model)) != expected:
                raise ValueError(
                    f"the {side} model's weights (fingerprint {found}) are not those these bridges "
                    f"were trained with ({expected}); load that {side} model, or train new bridges"
                )

    def save(self, folder: str | Path) -> None:
        """Write the folder: weights in safetensors, config and fingerprints in JSON."""
        state = {
            "config": asdict(self.config),
            "dense_fingerprint": self.dense_fingerprint,
            "sparse_fingerprint": self.sparse_fingerprint,
        }
        write_folder(Path(folder), {"bridges": self.state_dict()}, state)

    @classmethod
    def load(cls, folder: str | Path) -> BridgeSet:
        """Read what `save` wrote."""
        tensors, state = read_folder(Path(folder), "bridges")
        try:
            bridges = cls(BridgeConfig.from_dict(state["config"]))
            bridges.load_state_dict(tensors["bridges"])
            bridges.dense_fingerprint = state["dense_fingerprint"]
            bridges.sparse_fingerprint = state["sparse_fingerprint"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"state.json and bridges.safetensors in {folder} do not belong together ({error}); "
                "restore the folder, or train again"
            ) from error
        return bridges
