import pytest

from sparse.training.recipes import gao2025


def test_the_preset_has_the_published_numbers():
    p = gao2025("runs/x")
    m, c = p.model, p.pretrain
    assert (m.hidden_size, m.intermediate_size, m.num_hidden_layers) == (1024, 4096, 8)
    assert (m.head_dim, m.num_attention_heads, m.vocab_size) == (16, 64, 2048)
    assert m.activation_fraction == 0.25 and len(m.activation_locations) == 8
    assert (m.positions, m.bigram_table, m.activation) == ("none", True, "gelu")
    assert (c.sparsity.density, c.sparsity.embedding_density, c.sparsity.floor) == (
        1 / 64,
        1 / 16,
        4,
    )
    assert (c.sparsity.anneal_start, c.sparsity.anneal_end) == (0.01, 0.5)
    assert (c.lr, c.warmup, c.betas, c.eps, c.weight_decay) == (
        1.28e-2,
        0.01,
        (0.9, 0.95),
        0.1,
        0.1,
    )
    assert (p.batch_size, p.length) == (512, 256)
    assert c.train.steps * 512 * 256 <= 32e9 < (c.train.steps + 1) * 512 * 256
    wide = gao2025("runs/x", expansion=8, pfrac=0.5)  # the released csp_bridges2
    assert wide.pretrain.sparsity.density == 1 / 128
    assert wide.pretrain.sparsity.embedding_density == 1 / 16
    changed = gao2025("runs/x", steps=7, model=dict(num_hidden_layers=2), lr=1.0)
    assert (changed.pretrain.train.steps, changed.pretrain.lr) == (7, 1.0)
    assert changed.model.num_hidden_layers == 2
    for fields in (dict(pfrac=0), dict(pfrac=5), dict(expansion=0.5, pfrac=0.4)):
        with pytest.raises(ValueError, match="keeps no weight, or more than all"):
            gao2025("runs/x", **fields)
    with pytest.raises(ValueError, match="width of 260, which heads of 16 do not divide"):
        gao2025("runs/x", expansion=1.015)
