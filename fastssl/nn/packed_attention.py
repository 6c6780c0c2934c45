"""PackedAttention: a ViT's attention of dense, masked and packed tokens, and rows of it for chosen queries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastssl import _checks
from fastssl._autocast import without_autocast
from fastssl.ops._qkv import qkv_masked_attention, qkv_packed_attention
from fastssl.packed_tokens import PackedTokens

_OP = "PackedAttention"


class PackedAttention(nn.Module):
    """Multi-head self-attention with the parameters of timm's and DINO's ViTs, whose state dicts it loads.

    Equivalent, for dense tokens, to::

        q, k, v = qkv(x).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        proj(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))

    With `keep`, attention goes among the kept tokens of each image (`fastssl.masked_attention`) and dropped tokens come
    back as zeros, without proj's bias, so that a residual stream leaves them as they are. Packed tokens attend within
    their sequence (`fastssl.packed_attention`). What is dropped by `keep` still goes through both projections, and has
    to be finite: pack (`fastssl.pack(x, keep)`) to save that too. No dropout.

    Args:
        dim: C, the number of channels.
        num_heads: H, a divisor of dim.
        qkv_bias, proj_bias: whether the projections have a bias.
        scale: factor of the dot products; None means d**-0.5.
        device, dtype: of the parameters.

    Source: DINOv2 (arXiv 2304.07193) for packed crops, MAE (arXiv 2111.06377) for dropped tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_count(_OP, "dim", dim)
        _checks.check_count(_OP, "num_heads", num_heads)
        if dim % num_heads != 0:
            raise ValueError(f"{_OP}: num_heads must divide dim = {dim}, got {num_heads}")
        _checks.check_flag(_OP, "qkv_bias", qkv_bias)
        _checks.check_flag(_OP, "proj_bias", proj_bias)
        if scale is not None:
            _checks.check_number(_OP, "scale", scale)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = float(self.head_dim**-0.5 if scale is None else scale)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    @overload
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, x: PackedTokens, keep: None = None) -> PackedTokens: ...
    def forward(self, x: Tensor | PackedTokens, keep: Tensor | None = None) -> Tensor | PackedTokens:
        """The attended and projected tokens, like x.

        Args:
            x: tokens (B, N, C), or PackedTokens.
            keep: for (B, N, C), (B, N) bool, True: the token is kept; None keeps all.

        Raises:
            TypeError: an argument of a wrong type or dtype.
            ValueError: a wrong shape, value or device.
        """
        self._check(x, keep)
        if isinstance(x, PackedTokens):
            qkv = self.qkv(x.values).unflatten(1, (3, self.num_heads, self.head_dim))
            heads = qkv_packed_attention(qkv, x.cu_seqlens, x.max_seqlen or None, self.scale)
            return x.replace(self.proj(heads.flatten(1)))
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        out: Tensor = self.proj(qkv_masked_attention(qkv, keep, self.scale).flatten(2))
        if keep is None or self.proj.bias is None:
            return out
        return out.masked_fill(~keep[..., None], 0.0)

    @overload
    def attention_rows(self, x: Tensor, queries: Sequence[int] | Tensor, keep: Tensor | None = None) -> Tensor: ...
    @overload
    def attention_rows(self, x: PackedTokens, queries: Sequence[int] | Tensor, keep: None = None) -> list[Tensor]: ...
    def attention_rows(
        self, x: Tensor | PackedTokens, queries: Sequence[int] | Tensor, keep: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """How much chosen tokens, such as the class token, attend to every token. Never makes an N×N matrix.

        Equivalent to ``softmax(scale · q[queries] kᵀ)``; differentiable, and v is not computed.

        Args:
            x: tokens (B, N, C), or PackedTokens.
            queries: the k tokens, numbered within each image or sequence: ints, negative ones counting from the end, or
                a (k,) int64 tensor on the device of x, from 0 on, whose values are checked on the CPU alone.
            keep: for (B, N, C), (B, N) bool, True: the token is kept; None keeps all.

        Returns:
            (B, H, k, N), where dropped queries have rows of zeros, or of PackedTokens a list of (H, k, N_i), one for
            each sequence, in the projection's dtype. Waits for the device where the lengths of packed tokens are not
            known.

        Raises:
            TypeError, ValueError: as the call; a query that an image or sequence does not have.
        """
        self._check(x, keep)
        if isinstance(x, PackedTokens):
            rows: list[Tensor] = []
            lengths, begin = x.sequence_lengths(), 0
            for length, run in itertools.groupby(lengths):  # crops of one size are one batch
                count = len(list(run))
                crops = x.values[begin : begin + count * length].view(count, length, self.dim)
                rows += self._rows(crops, self._queries(queries, length, crops), None).unbind(0)
                begin += count * length
            return rows
        return self._rows(x, self._queries(queries, x.shape[1], x), keep)

    def _rows(self, x: Tensor, queries: list[int] | Tensor, keep: Tensor | None) -> Tensor:
        if isinstance(queries, Tensor):
            chosen = x.index_select(1, queries)
        else:  # one by one: no index has to get to a GPU
            chosen = torch.stack([x[:, i] for i in queries], 1) if queries else x[:, :0]
        q, k = (
            self._part(tokens, part).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part, tokens in enumerate((chosen, x))
        )
        logits = _logits(q, k, self.scale)
        if keep is None:
            return logits.softmax(-1).to(q.dtype)
        # The smallest number in place of −inf: an image that keeps nothing is then 0, not NaN.
        logits = torch.where(keep[:, None, None, :], logits, torch.finfo(logits.dtype).min)
        if isinstance(queries, Tensor):
            asks = keep.index_select(1, queries)
        else:
            asks = torch.stack([keep[:, i] for i in queries], 1) if queries else keep[:, :0]
        return torch.where(asks[:, None, :, None], logits.softmax(-1), 0.0).to(q.dtype)

    def _part(self, x: Tensor, part: int) -> Tensor:
        """The queries (0) or keys (1) of tokens; what stands in for a plain qkv (LoRA) is asked for all three."""
        rows = slice(part * self.dim, (part + 1) * self.dim)
        if type(self.qkv) is not nn.Linear:
            of_any_kind: Tensor = self.qkv(x)
            return of_any_kind[..., rows]
        bias = self.qkv.bias
        return nn.functional.linear(x, self.qkv.weight[rows], None if bias is None else bias[rows])

    def _check(self, x: Any, keep: Any) -> None:
        if isinstance(x, PackedTokens):
            if keep is not None:
                raise ValueError(f"{_OP}: keep must be None for PackedTokens, got {type(keep).__name__}")
            _checks.check_tensor(_OP, "x.values", x.values)
            if x.values.dim() != 2 or x.values.shape[1] != self.dim:
                raise ValueError(f"{_OP}: x.values must be (T, C) with C = {self.dim}, got {_checks.shape(x.values)}")
            return
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: x must be a Tensor or PackedTokens, got {type(x).__name__}")
        _checks.check_tensor(_OP, "x", x)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"{_OP}: x must be (B, N, C) with C = {self.dim}, got {_checks.shape(x)}")
        if keep is None:
            return
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            got = f"dtype {str(keep.dtype)[6:]}" if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"{_OP}: keep must be None or a Tensor of dtype bool, got {got}")
        _checks.check_strided(_OP, "keep", keep)
        _checks.check_same_device(_OP, "keep", keep, "x", x)
        if keep.shape != x.shape[:2]:
            raise ValueError(f"{_OP}: keep must be (B, N) = {tuple(x.shape[:2])} of x, got {_checks.shape(keep)}")

    def _queries(self, queries: Any, length: int, x: Tensor) -> list[int] | Tensor:
        """As a list within `length`, or a GPU's tensor, as it is."""
        if isinstance(queries, Tensor):
            if queries.dtype != torch.int64 or queries.dim() != 1:
                got = f"{_checks.shape(queries)} of dtype {str(queries.dtype)[6:]}"
                raise ValueError(f"{_OP}: queries must be ints or a (k,) int64 tensor, got {got}")
            if queries.device.type != "cpu" or torch.compiler.is_compiling():
                _checks.check_same_device(_OP, "queries", queries, "x", x)
                return queries
            queries = queries.tolist()
        if not isinstance(queries, list | tuple) or not all(type(i) is int for i in queries):
            raise TypeError(f"{_OP}: queries must be ints or a (k,) int64 tensor, got {queries!r}")
        for i in queries:
            if not -length <= i < length:
                raise ValueError(f"{_OP}: queries must be tokens of {length}, got {i}")
        return list(queries)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale:.4g}"


@without_autocast
def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, H, k, N), in float32 at least."""
    work = torch.promote_types(q.dtype, torch.float32)
    return scale * q.to(work) @ k.to(work).transpose(-1, -2)
