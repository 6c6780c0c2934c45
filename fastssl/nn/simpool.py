"""SimPool: attentive pooling of patch tokens, in place of a class token, as a module."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import _checks
from fastssl.ops.simpool import simpool

_OP = "SimPool"
_VALUE_MINIMA = ("batch", "channel")
#: timm's names of the layers, and those here, which are the published ones.
_OF_TIMM = {"norm": "norm_patches", "q": "wq", "k": "wk"}
_log = logging.getLogger(__name__)


class SimPool(nn.Module):
    """Pools tokens by their attention to a query that is made from their mean.

    Equivalent to::

        y = norm_patches(x)                                                # LayerNorm(dim, eps=1e-6)
        a = (wq(x.mean(1)) · wk(y) * head_dim**-0.5).softmax(-1)           # for each head
        out = a @ y                                                        # gamma=None
        out = (a @ (y - min + 1e-6)**gamma)**(1 / gamma) + beta            # with use_beta; else without beta

    by `fastssl.simpool`, which reads x and never holds the keys or y. Initialised as `nn.LayerNorm` and `nn.Linear`
    are, which is what the published layer does.

    Args:
        dim: C, the number of channels.
        num_heads: H, a divisor of C; the published layer has one.
        qkv_bias: whether the projections have biases. That of the keys changes nothing; it is there for checkpoints.
        gamma: exponent of the generalised mean; the paper takes 2 for convolutional networks and 1.25 for ViTs,
            None is a plain weighted mean.
        use_beta: adds a learned number, 0 at first, to the result; needs `gamma`.
        value_min: the minimum that is subtracted before the power: "batch", as the paper's code has it, of the whole
            batch, so that an image's result depends on the others; "channel", as timm has it, of each channel of each
            image.
        return_attention: `forward` also returns the attention.
        device, dtype: of the parameters.

    Shapes:
        x (B, N, C), tokens without the class token, or (B, C, h, w) → pooled (B, C), for every B, with
        `return_attention` also the attention (B, H, N); both in x's dtype.

    `load_state_dict` also takes the keys of timm's SimPool1d and SimPool2d (``norm.*``, ``q.*``, ``k.*``) and logs
    what it renamed; it refuses checkpoints with ``qk_norm``, which this layer has not. Without gamma the result is
    timm's, with gamma it is for ``value_min="channel"``, but for the LayerNorm's eps: timm's is 1e-5, this one's the
    published 1e-6 (set `norm_patches.eps` to change it). timm multiplies by the attention in one call of
    scaled_dot_product_attention, whose rounding differs, and in half precision computes all but that in half
    precision.

    A timm ViT pools with it by ``model.attn_pool = SimPool(model.embed_dim)``; timm strips the prefix tokens.

    Source: SimPool (arXiv 2309.06891), Algorithm 1.
    """

    beta: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = False,
        gamma: float | None = None,
        use_beta: bool = False,
        value_min: str = "batch",
        return_attention: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_count(_OP, "dim", dim)
        _checks.check_count(_OP, "num_heads", num_heads)
        if dim % num_heads != 0:
            raise ValueError(f"{_OP}: num_heads must divide dim = {dim}, got {num_heads}")
        _checks.check_flag(_OP, "qkv_bias", qkv_bias)
        if gamma is not None:
            _checks.check_number(_OP, "gamma", gamma, positive=True)
        _checks.check_flag(_OP, "use_beta", use_beta)
        if use_beta and gamma is None:
            raise ValueError(f"{_OP}: use_beta must be False where gamma is None, got True")
        _checks.check_choice(_OP, "value_min", value_min, _VALUE_MINIMA)
        _checks.check_flag(_OP, "return_attention", return_attention)
        self.dim = dim
        self.num_heads = num_heads
        self.gamma = gamma
        self.value_min = value_min
        self.return_attention = return_attention
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6, **made)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias, **made)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias, **made)
        self.register_parameter("beta", nn.Parameter(torch.zeros((), **made)) if use_beta else None)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The pooled vectors (B, C), or (pooled, attention (B, H, N)) with `return_attention`.

        Args:
            x: tokens (B, N, C) without the class token, or a feature map (B, C, h, w).

        Raises:
            TypeError: x of a wrong type or dtype.
            ValueError: x of a wrong shape.
        """
        _checks.check_tensor(_OP, "x", x)
        if x.dim() not in (3, 4):
            raise ValueError(f"{_OP}: x must be (B, N, C) or (B, C, h, w), got {_checks.shape(x)}")
        if x.shape[1 if x.dim() == 4 else 2] != self.dim:
            raise ValueError(f"{_OP}: x must have C = {self.dim} channels, got {_checks.shape(x)}")
        return simpool(
            x,
            self.wq.weight,
            self.wk.weight,
            self.norm_patches.weight,
            self.norm_patches.bias,
            bq=self.wq.bias,
            bk=self.wk.bias,
            num_heads=self.num_heads,
            gamma=self.gamma,
            beta=self.beta,
            value_min=self.value_min,
            norm_eps=self.norm_patches.eps,
            return_attention=self.return_attention,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Renames timm's keys first. `load_state_dict` passes a copy of the caller's dictionary, so in place."""
        normed = [key for key in state_dict if key.startswith((f"{prefix}q_norm.", f"{prefix}k_norm."))]
        if normed:
            for key in normed:
                del state_dict[key]
            error_msgs.append(f"{_OP}: normalised queries and keys (timm's qk_norm) are not supported, got {normed}")
        renamed = []
        for old, new in _OF_TIMM.items():
            for name in ("weight", "bias"):
                key, wanted = f"{prefix}{old}.{name}", f"{prefix}{new}.{name}"
                if key in state_dict and wanted not in state_dict:
                    state_dict[wanted] = state_dict.pop(key)
                    renamed.append(f"{key} -> {wanted}")
        if renamed:
            _log.warning("%s: renamed timm's keys: %s", _OP, ", ".join(renamed))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, qkv_bias={self.wq.bias is not None}, gamma={self.gamma}, "
            f"use_beta={self.beta is not None}, value_min={self.value_min!r}, "
            f"return_attention={self.return_attention}"
        )
