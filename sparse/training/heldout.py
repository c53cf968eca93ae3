"""The loss of a language model on held-out text, and its control: a model of token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from sparse.model.gpt import SparseGPT
from sparse.model.modes import mode
from sparse.ops.csr_linear import csr_products
from sparse.ops.prefix import count_tokens


@torch.no_grad()
def heldout_nats(
    model: SparseGPT,
    batches: Iterable[Int[Tensor, "_ pos"]],
    accelerator: Accelerator | None = None,
) -> float:
    """Return the mean cross entropy over all predicted tokens of `batches`, in nats per token.

    With an `accelerator`, its processes share the batches and all return the same number. Raises
    ValueError where `batches` hold no token to predict.

    >>> from bridges import load_run
    >>> from sparse import heldout_nats, unigram_nats
    >>> run = load_run("tiny")
    >>> blocks = run.heldout()
    >>> control = unigram_nats(blocks, [blocks[:4]], vocab_size=2048)
    >>> heldout_nats(run.sparse, [blocks[:4]]) < control  # both in nats per token
    True
    """
    world = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)  # nats, tokens
    with csr_products(model), mode(model, training=False):
        for i, ids in enumerate(batches):
            if i % world == rank:
                ids = ids.to(sums.device)
                sums[0] += _cross_entropy(model, ids, "sum").double()
                sums[1] += ids[:, 1:].numel()
    if accelerator:
        sums = accelerator.reduce(sums, "sum")
    nats, tokens = sums.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if not tokens:
        raise ValueError("heldout_nats: there is no token to predict; give held-out text")
    return nats / tokens


def unigram_nats(
    blocks: Int[Tensor, "block pos"],
    batches: Iterable[Int[Tensor, "_ _"]],
    vocab_size: int,
    prefix: Sequence[int] = (),
) -> float:
    """Return the cross entropy on `batches` of a model that knows only token counts (a unigram).

        -mean log q(v),   q(v) = (count of v in blocks + 1) / (tokens in blocks + vocab_size)

    The mean is over the same predicted tokens as in `heldout_nats`, in nats per token. It is the
    control of a language model: one that uses its context should score below it. `prefix` is that
    of the tokenizer (`prefix_ids`), with which every block begins; its first token is predicted
    nowhere and is not counted.

    >>> import torch
    >>> from sparse import unigram_nats
    >>> text = torch.tensor([[0, 0, 0, 1]])
    >>> round(unigram_nats(text, [text], vocab_size=2), 3)  # -(2 ln 4/6 + ln 2/6) / 3
    0.637
    """
    counts = count_tokens(blocks, vocab_size, prefix)
    log_q = (counts.double() + 1).log()
    log_q -= log_q.logsumexp(0)
    return -torch.cat([log_q[ids[:, 1:].cpu()].flatten() for ids in batches]).mean().item()


def _cross_entropy(
    model: SparseGPT, ids: Int[Tensor, "batch pos"], over: Literal["mean", "sum"]
) -> Float[Tensor, ""]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction=over)
