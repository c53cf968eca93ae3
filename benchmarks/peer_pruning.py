"""The plain form of mask training: what the public replication of bridges does, written anew.

One parameter tau per location, logits of every position over the whole vocabulary, AbsTopK by
`topk` and `scatter`, attention with a sink column under a T x (T+1) mask, masks set node by node
from a ranking, two batches per probe of the bisection. Dense products throughout. It reads the
weights of a SparseGPT, so that its losses can be compared; it is a baseline, not a part of the
library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse import PruneConfig, SparseGPT, SparseGPTConfig, project_
from sparse.circuits.mask import straight_through

SIZES = {  # d_resid, layers, vocabulary of the sizes S and W
    "S": dict(hidden_size=256, num_hidden_layers=2, vocab_size=2048, intermediate_size=1024),
    "W": dict(hidden_size=1024, num_hidden_layers=2, vocab_size=4096, intermediate_size=4096),
}


def sparse_model(size: str, density: float = 1 / 64, **fields) -> SparseGPT:
    """Return a model of random weights, every matrix projected to `density` (at least 4 a row)."""
    torch.manual_seed(0)
    shape = SIZES[size]
    n_heads = shape["hidden_size"] // 16
    config = SparseGPTConfig(**shape, num_attention_heads=n_heads, head_dim=16, **fields)
    model = SparseGPT(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(0, (density * p.shape[1]) ** -0.5)
            floor = min(4, p.shape[1])
            project_(p, max(int(density * p.numel()), floor * len(p)), floor)
        elif p is not model.model.norm.weight and float(p.abs().max()) == 0:
            p.normal_(0, 0.02)
    return model


def random_values(model: SparseGPT, scale: float = 0.05) -> dict[str, Tensor]:
    """Return a value for every node, as node means would be."""
    rng = torch.Generator().manual_seed(1)
    return {at: scale * torch.randn(w, generator=rng) for at, w in model.node_widths().items()}


class PeerMasks(nn.Module):
    """tau per location, and the masked model in the plain form."""

    def __init__(self, model: SparseGPT, ablation: dict[str, Tensor], config: PruneConfig) -> None:
        super().__init__()
        self.model, self.ablation, self.config = model, ablation, config
        self.locations = list(ablation)
        self.tau = nn.ParameterList(torch.full((len(x),), config.bias) for x in ablation.values())
        self.optimizer = torch.optim.AdamW(
            self.tau.parameters(),
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )

    def node(self, at: str, x: Tensor) -> Tensor:
        """AbsTopK, then m x + (1 - m) mu."""
        k = self.model.node(at).k
        if k < x.shape[-1]:
            indices = x.abs().topk(k, dim=-1).indices
            x = torch.zeros_like(x).scatter(-1, indices, x.gather(-1, indices))
        m = straight_through(self.tau[self.locations.index(at)], self.config.theta)
        return m * x + (1 - m) * self.ablation[at]

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits at every position."""
        trunk = self.model.model
        z = trunk.wte(ids)
        for i, block in enumerate(trunk.blocks):
            attn, mlp = block.attn, block.mlp
            u = self.node(f"{i}.attn.act_in", block.norm_1(z))
            thirds = zip("qkv", attn.qkv(u).chunk(3, dim=-1), strict=True)
            q, k, v = (
                self.node(f"{i}.attn.{name}", x)
                .unflatten(-1, (attn.n_head, attn.d_head))
                .transpose(1, 2)
                for name, x in thirds
            )
            y = sink_attention(q, k, v, attn.sinks, attn.scaling).transpose(1, 2).flatten(-2)
            z = z + self.node(f"{i}.attn.resid_delta", attn.out(y))
            u = self.node(f"{i}.mlp.act_in", block.norm_2(z))
            a = self.node(f"{i}.mlp.post_act", mlp.activation(mlp.fc(u)))
            z = z + self.node(f"{i}.mlp.resid_delta", mlp.proj(a))
        return self.model.lm_head(trunk.norm(z))

    def nats(self, ids: Tensor, last: Tensor, target: Tensor, foil: Tensor) -> Tensor:
        """Return the mean task loss."""
        row = torch.arange(len(ids))
        logits = self(ids)[row, last]
        return F.softplus(logits[row, foil] - logits[row, target]).mean()

    def train_step(self, *batch: Tensor) -> float:
        """Take one step on tau and return the loss."""
        kept = sum(straight_through(tau, self.config.theta).sum() for tau in self.tau)
        loss = self.nats(*batch) + self.config.k_coef * kept
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tau.parameters(), self.config.clip)
        self.optimizer.step()
        with torch.no_grad():
            for tau in self.tau:
                tau.clamp_(-1, 1)
        return loss.item()

    @torch.no_grad()
    def keep_top_k(self, k: int, ranking: list[Tensor]) -> None:
        """Keep the k nodes of largest tau, set one by one."""
        nodes = [(float(v), i, j) for i, tau in enumerate(ranking) for j, v in enumerate(tau)]
        nodes.sort(key=lambda node: -node[0])
        for tau in self.tau:
            tau.fill_(-1.0)
        for _, i, j in nodes[:k]:
            self.tau[i][j] = 1.0

    @torch.no_grad()
    def evaluate_at_k(self, k: int, ranking: list[Tensor], batches: list[tuple]) -> float:
        """Return the loss with the first k nodes kept, every batch run again."""
        self.keep_top_k(k, ranking)
        return sum(self.nats(*batch).item() for batch in batches) / len(batches)

    def discretise(self, goal: float, batches: list[tuple]) -> int:
        """Bisect the smallest k whose loss meets the goal."""
        ranking = [tau.detach().clone() for tau in self.tau]
        low, high = 0, sum(len(tau) for tau in ranking)
        while high - low > 1:
            middle = (low + high) // 2
            if self.evaluate_at_k(middle, ranking, batches) <= goal:
                high = middle
            else:
                low = middle
        return high


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float) -> Tensor:
    """Attend under a mask of T x (T+1) that holds the sink logit in its last column."""
    n_pos = q.shape[2]
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    mask = torch.zeros(len(sink), n_pos, n_pos).masked_fill(~causal, -torch.inf)
    mask = torch.cat([mask, sink.view(-1, 1, 1).expand(-1, n_pos, 1)], dim=-1)
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
