"""Which site of a dense model answers which site of a sparse one, where depths differ.

map     d_1 < d_2 < ..  (dense sites)    s_1 < s_2 < ..  (sparse sites)     strictly monotone
even    larger_i = round(i (N - 1) / (n - 1))                 n sites of the smaller, N >= n
"""

from __future__ import annotations


def even_sites(n_dense: int, n_sparse: int) -> dict[int, int]:
    """Return {dense site: sparse site}: all sites of the smaller model, even over the larger.

    First to first and last to last; halves are rounded to even. Equal numbers give the identity;
    a dense model of L+1 sites and a sparse one of 2L+1 give i to 2i, block boundary to block
    boundary.
    """
    n, larger = sorted((n_dense, n_sparse))
    at = [round(i * (larger - 1) / max(1, n - 1)) for i in range(n)]
    pairs = enumerate(at) if n == n_dense else ((d, i) for i, d in enumerate(at))
    return dict(pairs)
