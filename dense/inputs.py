"""Make and check the keyword arguments with which a model is called here."""

import inspect
from typing import Any

import torch
from torch import Tensor


class Inputs:
    """Makes the keyword arguments of one model's forward from ids, mask and positions.

    The model is never asked for a cache. With a mask and without positions, the positions number
    the real tokens of each row, so that a padded row gives the same logits as it does alone. Some
    models do not do so even then; a short probe finds out when the model is opened, and for them
    padding on the left is refused. Raises ValueError for what the model cannot take.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = model.config.model_type
        self.takes = set(inspect.signature(type(model).forward).parameters)
        self.takes_mask = "attention_mask" in self.takes
        self.pads_left = True  # DenseModel sets it to what proof.pads_left finds

    def __call__(
        self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the arguments. Shapes are checked, but not whether the ids can be embedded."""
        self._check(ids)
        kwargs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        takes_positions = "position_ids" in self.takes
        if attention_mask is not None:
            self._check_mask(attention_mask)
            kwargs["attention_mask"] = attention_mask
            if position_ids is None and takes_positions:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if position_ids is not None:
            if not takes_positions:
                raise ValueError(f"{self.family} numbers its positions itself; pass none")
            kwargs["position_ids"] = position_ids
        return kwargs

    @property
    def limit(self) -> int | None:
        """Largest number of positions the model was built for; None where its config has none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit is not None and limit > 0 else None

    def check_embeddable(self, ids: Tensor) -> None:
        """Raise ValueError for ids outside the embedding.

        On an accelerator the check is queued on the device and this call returns without waiting
        for its result. A wrong id then stops the program there, with this message.
        """
        self._check(ids)
        n_embedded = self.model.get_input_embeddings().weight.shape[0]
        inside = ((ids >= 0) & (ids < n_embedded)).all()
        if ids.device.type != "cpu":
            says = f"there are ids outside 0..{n_embedded - 1}, what {self.family} embeds"
            torch._assert_async(inside, says)  # pyright: ignore[reportPrivateImportUsage]
        elif not inside:
            raise ValueError(
                f"ids range over {ids.min().item()}..{ids.max().item()}, but {self.family} "
                f"embeds 0..{n_embedded - 1}; were they made by another model's tokenizer?"
            )

    def _check(self, ids: Tensor) -> None:
        if self.model.training:
            raise ValueError(
                f"{self.family} was put into train mode after it was opened; its residuals "
                "would depend on dropout. Call model.eval()"
            )
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"ids must be (batch, pos) and not empty, got {tuple(ids.shape)}")
        if (limit := self.limit) is not None and limit < ids.shape[1]:
            raise ValueError(
                f"ids have {ids.shape[1]} positions, but {self.family} was built for at most "
                f"{limit}; shorten or split them"
            )

    def _check_mask(self, mask: Tensor) -> None:
        if not self.takes_mask:
            raise ValueError(f"{self.family} takes no attention_mask; run rows of one length")
        if not self.pads_left and not mask[:, 0].all():
            raise ValueError(
                f"a row of {self.family} that is padded on the left does not answer as it does "
                "alone: it numbers positions by place, or has a state that padding moves; pad on "
                "the right"
            )


def check_positions(positions: Tensor, ids: Tensor) -> None:
    """Raise ValueError for positions that are not (batch, wanted), or not among those of `ids`.

    On an accelerator the range is checked as that of ids is (`Inputs.check_embeddable`).
    """
    n_rows, n_pos = ids.shape
    if positions.ndim != 2 or len(positions) != n_rows or not positions.numel():
        raise ValueError(
            f"positions are {tuple(positions.shape)}, but {n_rows} rows need (batch, wanted) = "
            f"({n_rows}, 1 or more); for one position a row, last, give last[:, None]"
        )
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(
            f"positions are {positions.dtype}, but a position is a whole number; give the indices "
            "of the columns that are wanted"
        )
    inside = ((positions >= 0) & (positions < n_pos)).all()
    if positions.device.type != "cpu":
        says = f"there are positions outside 0..{n_pos - 1}, those of the ids"
        torch._assert_async(inside, says)  # pyright: ignore[reportPrivateImportUsage]
    elif not inside:
        raise ValueError(
            f"positions range over {positions.min().item()}..{positions.max().item()}, but the ids "
            f"have 0..{n_pos - 1}; count from the first column, padding included"
        )


def at_positions(positions: Tensor, h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residuals and the tokens at position positions[b, i] of every row b.

    They are (batch, wanted, d) and (batch, wanted).
    """
    where = positions.long()
    return h.take_along_dim(where[..., None], 1), ids.gather(1, where)
