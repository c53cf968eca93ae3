"""Calibration: the scale and shift of a circuit's logit difference that give the least task loss.

Pruning changes both, and two numbers undo that (docs/method.md#calibration).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F


def calibrate(delta: Float[Tensor, " prompt"]) -> tuple[float, float]:
    """Return the (alpha, beta) that minimise the task loss of alpha delta + beta.

        loss = mean softplus(-sign (alpha delta + beta)),  sign = +1, -1;  alpha in [0.01, 100]

    `delta` is the logit of target_1 minus that of target_2. Its first half is from contexts where
    target_1 is right (sign +1), its second half from the others (sign -1). Adding one number to all
    logits, as the replication does, would change no softmax and so no loss.
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
    """Return the task loss of every prompt after calibration, in nats; `delta` as in `calibrate`.

    loss = softplus(-sign (alpha delta + beta))
    """
    n = len(delta) // 2
    sign = torch.ones_like(delta)
    sign[n:] = -1
    return F.softplus(-sign * (alpha * delta + beta))
