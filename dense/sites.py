"""The description of a model's residual sites, and tools shared by finding and proving them.

Site 0 is after the embeddings, 2i+1 after the attention of block i, 2i+2 after its MLP. A model
whose blocks have no stream between two sublayers has the L+1 sites between its blocks.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .weights.placement import device_of

Composition = Literal["sequential", "parallel", "single", "post-norm", "whole", "mixed"]


class SiteError(ValueError):
    """The residual sites of this model could not be found or did not pass their proof."""


class explaining:
    """Turns an exception of the model's own code into a SiteError that names the module.

    The message carries the original one, and `doing` says what was tried.
    """

    def __init__(self, model: Any, doing: str) -> None:
        self.model, self.doing = model, doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, SiteError):
            return
        # a twin (twin.py) shares its dict of parameters with its original: so find the original
        names = {id(m._parameters): name for name, m in self.model.named_modules()}
        where = type(self.model).__name__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module._parameters) in names:
                where = f"{names[id(module._parameters)] or '(root)'} ({type(module).__name__})"
            trace = trace.tb_next
        raise SiteError(
            f"{family(self.model)}: {self.doing} failed in {where}: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the residual stream of a model can be read and replaced."""

    path: str
    """Dotted path of the list of blocks."""
    blocks: tuple[nn.Module, ...]
    """The model's own blocks."""
    halves: tuple[tuple[nn.Module, nn.Module], ...]
    """(attn_half, mlp_half) of each block; empty when blocks have no site inside."""
    composition: Composition
    """How a block combines its sublayers."""
    seen: str
    """Details of what the probe saw, where the composition alone does not explain it."""
    d_resid: int
    """Width of the residual stream."""
    arity: int
    """Length of the tuple that a block returns, 0 for a bare tensor."""


def perturbation(h: Tensor, seed: int = 0) -> Tensor:
    """Return Gaussian noise of the shape and root mean square of `h`."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(h) * h.float().square().mean().sqrt().to(h.dtype)


def allowed_error(x: Tensor) -> float:
    """Return the relative error that rounding may cause in another batch or summation order."""
    return 1e-3 if x.dtype in (torch.float32, torch.float64) else 5e-2


def exact_error(x: Tensor) -> float:
    """Return the relative error allowed between the same operations on the same numbers."""
    return 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2


def probe_ids(model: Any, seed: int = 0) -> Tensor:
    """Return two short random sequences on which a model is probed."""
    embedding = model.get_input_embeddings()
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, embedding.weight.shape[0], (2, 6), generator=g)
    return ids.to(device_of(embedding))


def find_blocks(model: Any) -> tuple[str, tuple[nn.Module, ...]]:
    """Return path and members of the list of blocks.

    It is the shallowest ModuleList with as many members as the config has layers. Raises SiteError
    where there is none, or where it holds one module several times.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(p, m) for p, m in lists if len(m) == n_layers]
    if not fitting:
        raise SiteError(
            f"{family(model)}: the config says {n_layers} layers, but no ModuleList has that "
            f"length; found {[(p, len(m)) for p, m in lists]}"
        )
    path, members = min(fitting, key=lambda found: (found[0].count("."), len(found[0])))
    if len(set(members)) < len(members):
        raise SiteError(
            f"{family(model)}: {path} lists one module several times; blocks that are one module "
            "cannot be told apart"
        )
    return path, tuple(members)


def family(model: Any) -> str:
    """Return the family's name in transformers, for example "gpt2"."""
    return str(model.config.model_type)
