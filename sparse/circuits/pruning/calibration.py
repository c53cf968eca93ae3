"""Scale and shift of a logit difference: what pruning does to them is undone by two numbers."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F


def calibrate(delta: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """Return the alpha, beta that minimise the task loss of alpha delta + beta.

    `delta` is the logit of target_1 minus that of target_2, its first half from contexts where
    target_1 is right, its second half from the others:

        loss = mean softplus(-sign (alpha delta + beta)),  sign = +1, -1;  alpha in [0.01, 100]

    (Adding one number to all logits, as others do, changes no softmax loss.)
    """
    d = delta.double().cpu().numpy()
    sign = np.repeat([1.0, -1.0], len(d) // 2)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        s = sign * (x[0] * d + x[1])
        slope = -sign * np.exp(-np.logaddexp(0, s)) / len(d)
        return np.logaddexp(0, -s).mean(), np.array([slope @ d, slope.sum()])

    bounds = [(0.01, 100.0), (None, None)]
    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.x[0]), float(found.x[1])


def calibrated_nats(
    delta: Float[Tensor, " prompt"], alpha: float, beta: float
) -> Float[Tensor, " prompt"]:
    """Return the nats of every prompt after calibration; `delta` as in `calibrate`."""
    n = len(delta) // 2
    sign = torch.ones_like(delta)
    sign[n:] = -1
    return F.softplus(-sign * (alpha * delta + beta))
