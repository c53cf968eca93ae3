"""Presets: how a twin and its bridges are trained for a dense model, as frozen values.

    preset = Preset.for_model(dense)
    twin, bridges, config = preset.build(dense)

A preset has a name, and `dataclasses.replace(preset, steps=1000)` is another one. "demo" and "long"
have rates that were tuned on the built-in model and are meant for it; all others have the default
rates of `CotrainConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # presets are read by --help, which should answer at once
    from accelerate import Accelerator
    from jaxtyping import Float, Int
    from torch import Tensor

    from bridges.maps.bridge import BridgeSet
    from bridges.training.config import CotrainConfig
    from sparse.model.gpt import SparseGPT

EVALUATED = 16
"""Held-out sequences that are scored at a time, at most."""
HEAD = 16
"""Width of an attention head of the twin; its own width is a multiple of it."""
SMALL = 20e6
"""Parameters below which a dense model is trained with on any machine as it is."""
SPARE = 0.9
"""Share of a device's memory that a plan may fill."""


class Design(NamedTuple):
    """A twin at its start, bridges to it, and their training."""

    sparse: SparseGPT
    bridges: BridgeSet
    config: CotrainConfig

    def kept_at_the_end(self) -> int:
        """Return how many parameters of the twin may be nonzero at the end of the training."""
        from bridges.cost.plan import nonzero_at_the_end

        return nonzero_at_the_end(self.sparse, self.config)

    def validation(
        self, heldout: Int[Tensor, "block pos"], batch: int, processes: int = 1
    ) -> list[Int[Tensor, "_ pos"]]:
        """Return the batches that an evaluation scores: as many blocks as it has time for.

        It gets at most a tenth of the training's time (`validation_sequences`). No batch is larger
        than a training pass of one process.
        """
        from bridges.training.validate import validation_sequences

        n = validation_sequences(self.config, len(self.bridges.config.sites), batch)
        of_pass = batch // (processes * self.config.train.accumulate)
        return list(heldout[:n].split(min(EVALUATED, max(1, of_pass))))


def told(text: str, **default: Any) -> Any:
    """Return a field with the help of its flag."""
    return field(metadata={"help": text}, **default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """How a twin and its bridges are made and trained, and which circuits are pruned."""

    name: str
    steps: int = told("optimizer steps")
    batch: int = told("sequences per step, over all processes and passes")
    length: int = told("tokens per sequence")
    expansion: float = told("width of the twin over the dense width")
    twin_layers: int | None = told("layers of the twin; None: the dense depth", default=None)
    sites: Mapping[int, int] = told(
        "which dense residual site is bridged to which sparse one: even, or D:S,D:S,...",
        default_factory=dict,
    )
    embeddings: Literal["own", "dense"] = told(
        "own: the twin learns its own; dense: the dense model's, frozen behind a learned map",
        default="own",
    )
    density: float = told("weights kept in the matrices; embeddings: 4 times that", default=1 / 16)
    encoder_k: float = told("entries an encoder keeps / the twin's width", default=1 / 4)
    lr: float = told("peak learning rate of the twin", default=3e-2)
    bridge_lr: float = told("peak learning rate of the bridges", default=3e-3)
    hybrid_weight: float = told("weight of the hybrid passes in the loss", default=1.0)
    prune_steps: int = told("optimizer steps of the pruning of a circuit")
    tasks: tuple[str, ...] = told("names, .jsonl files of your own, or all", default=("all",))
    force: bool = told("prune tasks that a model does not do, too", default=False)
    stream: bool = told("read and tokenize the text as it is needed, in order", default=False)
    mixed_precision: Literal["no", "bf16"] = told("precision of the passes", default="no")
    accumulate: int = told("passes per step, each on its share of the batch", default=1)
    seed: int = told("of weights, batches and pruning", default=0)

    def __post_init__(self) -> None:
        least = dict(steps=1, batch=1, length=2, prune_steps=0, accumulate=1, twin_layers=1)
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"--{name} {value} must be at least {lowest}")
        for name in ("expansion", "density", "encoder_k"):
            value, most = getattr(self, name), "" if name == "expansion" else " and at most 1"
            if not value > 0 or (most and value > 1):
                raise ValueError(f"--{name} {value} must be above 0{most}")

    @classmethod
    def for_model(cls, dense: Any, memory: float | None = None) -> Preset:
        """Return the preset for a dense model and a device of so many bytes of memory.

        Without `memory` it is that of the device at hand. A model under 20 M parameters takes
        "small", and the built-in one "demo". On a CPU a larger one takes "cpu", elsewhere the first
        of "gpt2-80gb", "gpt2-12gb" and thinner ones of the latter that `plan` says will fit.

        >>> from bridges import Preset
        >>> from dense import tiny
        >>> Preset.for_model(tiny()).name
        'demo'
        """
        if dense.model.num_parameters() < SMALL:
            return PRESETS["demo" if dense.name == "tiny" else "small"].within(dense)
        import torch

        if memory is None and not torch.cuda.is_available():
            return PRESETS["cpu"].within(dense)
        if memory is None:
            memory = float(torch.cuda.get_device_properties(0).total_memory)
        thin = PRESETS["gpt2-12gb"]
        ladder = [PRESETS["gpt2-80gb"], thin]
        ladder += [replace(thin, accumulate=thin.batch)]
        ladder += [replace(thin, accumulate=thin.batch, expansion=x) for x in (2 / 3, 1 / 3)]
        ladder = [preset.within(dense) for preset in ladder]
        for preset in ladder:
            if preset.memory(dense) <= SPARE * memory:
                return preset
        raise ValueError(
            f"no preset for {dense.name} fits into {memory / 1e9:.3g} GB: the thinnest needs "
            f"{ladder[-1].memory(dense) / 1e9:.3g}; take a smaller --expansion, --batch or --length"
        )

    def within(self, dense: Any) -> Preset:
        """Return the preset with sequences that the dense model can take."""
        limit = positions_limit(dense)
        return replace(self, length=min(self.length, limit)) if limit else self

    def memory(self, dense: Any) -> int:
        """Return the bytes on a device that `plan` predicts."""
        import torch

        from bridges.cost.plan import plan

        with torch.device("meta"):
            design = self.build(dense)
        return plan(dense, *design, self.batch, self.length).memory

    def check(self, dense: Any, processes: int = 1) -> None:
        """Raise ValueError for a batch that cannot be shared, and for too long sequences.

        And for a dense model without a tokenizer, which says how a text begins.
        """
        needs_tokenizer(dense)
        if self.batch % (processes * self.accumulate):
            raise ValueError(
                f"--batch {self.batch} cannot be shared by {processes} process(es) in "
                f"{self.accumulate} passes; give a multiple of {processes * self.accumulate}"
            )
        limit = positions_limit(dense)
        if limit and self.length > limit:
            raise ValueError(f"{dense.name} has {limit} positions; give --length {limit} or less")

    def build(self, dense: Any, folder: str = "runs/new", **train: Any) -> Design:
        """Return twin, bridges and configuration for a dense model with a tokenizer.

        `folder` is where the training writes, and `train` are further fields of `TrainConfig`.

        >>> from bridges import PRESETS
        >>> from dense import tiny
        >>> twin, bridges, config = PRESETS["demo"].build(tiny())
        >>> twin.config.hidden_size, config.train.steps
        (256, 500)
        """
        import torch

        from bridges.maps.bridge import BridgeConfig, BridgeSet
        from sparse.model.config import SparseGPTConfig
        from sparse.model.gpt import SparseGPT
        from sparse.ops.prefix import prefix_ids

        needs_tokenizer(dense)
        prefix = prefix_ids(dense.tokenizer)
        width = max(HEAD, int(self.expansion * dense.d_resid) // HEAD * HEAD)
        tables = embeddings_of(dense) if self.embeddings == "dense" else ()
        shape = SparseGPTConfig(
            vocab_size=dense.vocab_size,
            embedding_width=tables[0].shape[1] if tables else 0,
            tie_word_embeddings=len(tables) == 1,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=self.twin_layers or dense.n_layers,
            num_attention_heads=width // HEAD,
            head_dim=HEAD,
            max_position_embeddings=max(256, self.length),
            positions="learned",
            bos_token_id=prefix[0] if len(prefix) == 1 else None,  # where a generation begins
            eos_token_id=dense.tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.default_generator.manual_seed(self.seed)  # built on the CPU, wherever it trains
            sparse = SparseGPT(shape)
            if tables:
                sparse.borrow_(*tables)
            k = max(1, round(self.encoder_k * width))
            maps = BridgeConfig.between(dense, sparse, k=k, sites=dict(self.sites))
            bridges = BridgeSet(maps, seed=self.seed)
        config = self.training(folder, **train)
        config.sparsity.check(sparse)
        return Design(sparse, bridges, config)

    def accelerator(self) -> Accelerator:
        """Return an accelerator that computes in the preset's precision."""
        from accelerate import Accelerator

        return Accelerator(mixed_precision=self.mixed_precision)

    def training(self, folder: str, **train: Any) -> CotrainConfig:
        """Return the configuration of the training.

        What computes the sparse products is decided here (`sparse.with_products`): as asked for, as
        the run in `folder` began, or the fastest.
        """
        from bridges.training.config import CotrainConfig, LossWeights
        from sparse.training.config import TrainConfig
        from sparse.training.run_state import with_products
        from sparse.training.sparsity import SparsityConfig

        return CotrainConfig(
            train=with_products(
                TrainConfig(
                    steps=self.steps,
                    folder=folder,
                    seed=self.seed,
                    evaluate_every=max(1, self.steps // 10),
                    checkpoint_every=max(1, min(max(100, self.steps // 60), self.steps // 5)),
                    accumulate=self.accumulate,
                    mixed_precision=self.mixed_precision,
                    **train,
                )
            ),
            sparsity=SparsityConfig(
                density=self.density, embedding_density=min(1.0, 4 * self.density)
            ),
            weights=LossWeights(hybrid=self.hybrid_weight),
            lr=self.lr,
            bridge_lr=self.bridge_lr,
        )


def needs_tokenizer(dense: Any) -> None:
    """Raise ValueError for a dense model without a tokenizer."""
    if dense.tokenizer is None:
        raise ValueError(
            f"{dense.name} has no tokenizer; tokenizer.save_pretrained beside the weights"
        )


def embeddings_of(dense: Any) -> tuple[Float[Tensor, "vocab embedding"], ...]:
    """Return the rows of a dense model's embedding and unembedding; one table where it ties them.

    Raises ValueError where the two have different widths.
    """
    from dense.weights.placement import copies, stored

    model = dense.model
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    both = model.get_input_embeddings(), model.get_output_embeddings()
    if both[0].weight is both[1].weight or names[id(both[1])] in copies(model):
        both = both[:1]
    rows = tuple(stored(model, names[id(part)], part.weight).detach() for part in both)
    rows = tuple(table[: dense.vocab_size] for table in rows)
    if len({table.shape for table in rows}) > 1:
        shapes = [tuple(table.shape) for table in rows]
        raise ValueError(
            f"{dense.name}: its embedding and unembedding are {shapes}, and a twin borrows tables "
            "of one shape; give --embeddings own"
        )
    return rows


def positions_limit(dense: Any) -> int | None:
    """Return how many positions the dense model can take, None where its config does not say."""
    return getattr(dense.model.config.get_text_config(), "max_position_embeddings", None)


QUOTES = ("single_double_quote",)
_GPT2 = Preset(
    name="gpt2-12gb", steps=12_000, batch=32, length=512, expansion=4 / 3, prune_steps=600,
    mixed_precision="bf16", stream=True, accumulate=8,
)  # fmt: skip
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # six steps, which show that everything runs; no twin learns a task in them
        Preset(
            name="smoke", steps=6, batch=4, length=32, expansion=0.5, prune_steps=4, tasks=QUOTES,
            force=True,
        ),
        # found for the built-in model; at 3,000 steps other rates are best than at 500
        # (docs/bridge-study)
        Preset(
            name="demo", steps=500, batch=16, length=128, expansion=2.0, prune_steps=200,
            tasks=QUOTES, lr=6e-2, bridge_lr=3e-2, encoder_k=1 / 2,
        ),
        Preset(
            name="long", steps=3000, batch=16, length=128, expansion=2.0, prune_steps=600,
            lr=3e-2, bridge_lr=5e-3, encoder_k=1 / 2, hybrid_weight=2.0,
        ),
        Preset(
            name="small", steps=3000, batch=16, length=128, expansion=2.0, prune_steps=600,
        ),
        # a shallow, narrow twin of a model that is large for a CPU: 2 M tokens, too few to learn
        # embeddings of its own; the rate was compared on SmolLM2 (docs/smollm2)
        Preset(
            name="cpu", steps=2000, batch=8, length=128, expansion=1 / 2, prune_steps=600,
            twin_layers=6, embeddings="dense", lr=1e-2,
        ),
        # 1 B tokens for a card of 80 GB, 0.2 B for one of 12: bf16, text read as it is needed
        replace(
            _GPT2, name="gpt2-80gb", steps=30_000, batch=64, expansion=8 / 3, accumulate=2,
        ),
        _GPT2,
    )
}  # fmt: skip
