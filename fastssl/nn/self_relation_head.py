"""SelfRelationHead: SERE's projection and prediction of patch tokens, before they are related."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl import _checks

_OP = "SelfRelationHead"


class SelfRelationHead(nn.Module):
    """SERE's head: the teacher relates `projection(x)`, the student `predictor(projection(x))`.

    Equivalent, for a feature map, to::

        projection = nn.Sequential(nn.BatchNorm2d(dim), nn.ReLU())
        predictor = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        projected = projection(x)
        return projected, predictor(projected)

    Tokens are read and returned as views of channels-last feature maps, without a copy of their own. The modules
    are plain ones, with the names of published checkpoints: `nn.SyncBatchNorm.convert_sync_batchnorm` converts them.

    Args:
        dim: C, the number of channels.

    Source: SERE (arXiv 2206.05184). One head per granularity, and a second pair for local crops, on
    patch tokens without the class token, before the final norm of the backbone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _checks.check_count(_OP, "dim", dim)
        self.dim = dim
        self.projection = nn.Sequential(nn.BatchNorm2d(dim), nn.ReLU())
        self.predictor = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """The projected and the predicted tokens, both like x.

        Args:
            x: tokens (B, N, C) of a map or a feature map (B, C, h, w).
            grid_size: (h, w) with h·w = N for the tokens of a map that is not square; None: N = h².

        Raises:
            TypeError: an argument of a wrong type or dtype.
            ValueError: a wrong shape or value.
        """
        _checks.check_tensor(_OP, "x", x)
        tokens = _checks.map_of_tokens(_OP, "x", x, grid_size)
        if tokens.shape[3] != self.dim:
            raise ValueError(f"{_OP}: x must have C = {self.dim} channels, got {_checks.shape(x)}")
        projected = self.projection(tokens.permute(0, 3, 1, 2))
        predicted = self.predictor(projected)
        if x.dim() == 4:
            return projected, predicted
        return projected.flatten(2).transpose(1, 2), predicted.flatten(2).transpose(1, 2)
