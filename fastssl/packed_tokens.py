"""PackedTokens: sequences of tokens one behind the other, of crops of several sizes or of what a mask keeps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastssl import _checks

_OP = "pack"


@dataclass(frozen=True)
class _Origin:
    """What the host knows of the sequences. An object that torch.compile hands on without looking into it, or it would
    compile anew for another number of sequences."""

    lengths: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None  # of a list's elements, without channels
    size: tuple[int, int] | None = None  # (B, N) of one tensor


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """What `fastssl.pack` makes: S sequences of tokens, one behind the other, and how to take them apart again.

    ``len(packed)`` is S, ``packed[i]`` a view of sequence i, ``packed[a:b]`` PackedTokens of some of them, and a loop
    goes over views of all. A pytree node, whose leaves are its tensors, and a dataclass, so that `torch.compile`,
    DistributedDataParallel and the like find the tensors in it.

    Attributes:
        values: (T, C), or (T, …) after `replace`.
        cu_seqlens: (S + 1,) int32 on the device of values, where each sequence begins, and T at the end.
        max_seqlen: at least the length of the longest sequence.
        kept: of what a mask keeps, (T,) int64, the tokens' places among the B·N of the batch; else None.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    kept: Tensor | None = None
    _origin: _Origin = _Origin()

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The length of each sequence, where the host knows them; None where it would have to wait for a GPU."""
        return self._origin.lengths

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.split(self.sequence_lengths()))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> PackedTokens: ...
    def __getitem__(self, index: int | slice) -> Tensor | PackedTokens:
        """A view of one sequence, (N_i, C), or PackedTokens of a slice without steps, of views too.

        Waits for the device where `lengths` are not known.
        """
        lengths = self.sequence_lengths()
        if isinstance(index, slice):
            first, last, step = index.indices(len(lengths))
            if step != 1:
                raise ValueError(f"PackedTokens: a slice must have a step of 1, got {step}")
            last = max(first, last)
            begin, taken = sum(lengths[:first]), tuple(lengths[first:last])
            values = self.values[begin : begin + sum(taken)]
            starts = self.cu_seqlens[first : last + 1] - self.cu_seqlens[first]
            return PackedTokens(values, starts, max(taken) if taken else 0, None, _Origin(taken))
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"PackedTokens: an index must be an int or a slice, got {type(index).__name__}")
        if not -len(lengths) <= index < len(lengths):
            raise IndexError(f"PackedTokens: an index must be one of {len(lengths)} sequences, got {index}")
        index %= len(lengths)
        begin = sum(lengths[:index])
        return self.values[begin : begin + lengths[index]]

    def sequence_lengths(self) -> list[int]:
        """The length of each sequence. Waits for the device where `lengths` are not known."""
        return list(self.lengths) if self.lengths is not None else self.cu_seqlens.diff().tolist()

    def replace(self, values: Tensor) -> PackedTokens:
        """The same sequences with other values, (T, …) of any width and dtype: what a block or a head returns."""
        if not isinstance(values, Tensor):
            raise TypeError(f"PackedTokens.replace: values must be a Tensor, got {type(values).__name__}")
        if values.dim() < 1 or values.shape[0] != self.values.shape[0]:
            wanted = f"(T, …) with T = {self.values.shape[0]}"
            raise ValueError(f"PackedTokens.replace: values must be {wanted}, got {_checks.shape(values)}")
        return PackedTokens(values, self.cu_seqlens, self.max_seqlen, self.kept, self._origin)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> PackedTokens:
        """On another device, in another dtype of the values, or both, as Tensor.to has it."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        values = self.values.to(device=device, dtype=dtype, non_blocking=non_blocking)
        starts = self.cu_seqlens.to(device=device, non_blocking=non_blocking)
        kept = None if self.kept is None else self.kept.to(device=device, non_blocking=non_blocking)
        return PackedTokens(values, starts, self.max_seqlen, kept, self._origin)

    def unpack(self) -> list[Tensor] | Tensor:
        """What `pack` was given, with these values.

        Returns:
            Of a list, a list of views in the shapes of its elements; of one tensor, (B, N, C), a view, or with zeros
            where tokens were dropped; of a slice or of sequences packed elsewhere, a list of views (N_i, C).
        """
        width, size, shapes = self.values.shape[1:], self._origin.size, self._origin.shapes
        if size is not None:
            rows = self.values
            if self.kept is not None:
                rows = rows.new_zeros((size[0] * size[1], *width)).index_copy(0, self.kept, rows)
            return rows.view(*size, *width)
        if shapes is None:
            return list(self)
        parts = self.values.split([_count(shape) for shape in shapes])
        return [part.view(*shape, *width) for part, shape in zip(parts, shapes, strict=True)]


def pack(tokens: list[Tensor] | Tensor, keep: Tensor | None = None, num_kept: int | None = None) -> PackedTokens:
    """Tokens of crops of several sizes, or those that a mask keeps, one behind the other in one tensor.

    Equivalent to::

        torch.cat([x.flatten(0, -2) for x in tokens])                    # a list
        tokens.flatten(0, 1)                                             # one tensor
        tokens[keep]                                                     # and a mask

    Everything of a block that treats tokens one by one, norms, projections and MLPs, then takes ``packed.values``, and
    `fastssl.nn.PackedAttention` takes them as they are: nothing is padded, and what is dropped costs nothing.

    Args:
        tokens: a list of sequences (N_i, C) and batches (B_i, N_i, C), each of B_i sequences, of one dtype and C on
            one device; or one tensor (B, N, C). float32, float64, bfloat16 or float16. Lengths of zero are fine.
        keep: with one tensor, (B, N) bool, True: the token is kept; on the device of tokens or on the CPU.
        num_kept: with keep, how many it keeps in all. A GPU's keep then is not waited for: the host knows no lengths,
            and max_seqlen is N. On a GPU, and inside torch.compile, it is believed: a wrong one gives wrong tokens or
            an error of the device.

    Returns:
        PackedTokens; `unpack` gives back what came. A list of one, or one tensor without keep, is not copied.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device.

    Waits for a GPU only where keep is there and num_kept is not given, once. Inside torch.compile, keep needs num_kept,
    and cu_seqlens may be copied to the GPU from memory that is not pinned, which waits for it.
    Derivatives of any order, those of a gather written to rows of zeros.

    Source: DINOv2 (arXiv 2304.07193) packs its crops so; MAE (arXiv 2111.06377) drops tokens.
    """
    if isinstance(tokens, Tensor):
        return _pack_tensor(tokens, keep, num_kept)
    if not isinstance(tokens, list | tuple):
        raise TypeError(f"{_OP}: tokens must be a Tensor or a list of them, got {type(tokens).__name__}")
    for name, value in (("keep", keep), ("num_kept", num_kept)):
        if value is not None:
            raise ValueError(f"{_OP}: {name} must be None for a list of tokens, got {type(value).__name__}")
    if len(tokens) == 0:
        raise ValueError(f"{_OP}: tokens must have at least one element, got an empty list")
    for i, x in enumerate(tokens):
        _check_element(f"tokens[{i}]", x, tokens[0])
    rows = [x.flatten(0, 1) if x.dim() == 3 else x for x in tokens]
    shapes = tuple(tuple(x.shape[:-1]) for x in tokens)
    lengths = tuple(n for shape in shapes for n in itertools.repeat(shape[-1], 1 if len(shape) == 1 else shape[0]))
    values = rows[0] if len(rows) == 1 else torch.cat(rows)
    longest = max(lengths) if lengths else 0
    return PackedTokens(values, _starts(lengths, values.device), longest, None, _Origin(lengths, shapes))


def _pack_tensor(tokens: Tensor, keep: Any, num_kept: Any) -> PackedTokens:
    _checks.check_tensor(_OP, "tokens", tokens)
    if tokens.dim() != 3:
        raise ValueError(f"{_OP}: tokens must be (B, N, C) or a list, got {_checks.shape(tokens)}")
    batch, length = tokens.shape[:2]
    rows, device = tokens.flatten(0, 1), tokens.device
    if keep is None:
        if num_kept is not None:
            raise ValueError(f"{_OP}: num_kept must be None where keep is, got {num_kept!r}")
        lengths = (length,) * batch
        origin = _Origin(lengths, size=(batch, length))
        return PackedTokens(rows, _starts(lengths, device), length if batch else 0, None, origin)
    _check_keep(keep, num_kept, tokens)
    if num_kept is None or (keep.device.type == "cpu" and not torch.compiler.is_compiling()):
        known = tuple(keep.sum(1).tolist())
        total, longest, starts = sum(known), max(known) if known else 0, _starts(known, device)
        if num_kept not in (None, total):
            raise ValueError(f"{_OP}: num_kept must be the {total} tokens that keep keeps, got {num_kept}")
    else:
        known, total, longest = None, num_kept, length
        starts = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        starts = starts.to(device, non_blocking=True)
    kept = _on(torch.nonzero_static(keep.flatten(), size=total)[:, 0], device)
    # _Rows has no forward-mode derivatives, index_select has.
    wants_gradient = torch.is_grad_enabled() and rows.requires_grad and torch.autograd.forward_ad._current_level < 0
    values = _Rows.apply(rows, kept) if wants_gradient else rows.index_select(0, kept)
    return PackedTokens(values, starts, longest, kept, _Origin(known, size=(batch, length)))


class _Rows(torch.autograd.Function):
    """rows[kept], each at most once: the backward writes to zeros, where index_select's adds, row by row on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, kept: Tensor) -> Tensor:
        return rows.index_select(0, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.count = inputs[0].shape[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros((ctx.count, *grad.shape[1:])).index_copy(0, ctx.saved_tensors[0], grad), None


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    if sum(lengths) > 2**31 - 1:
        raise ValueError(f"{_OP}: tokens must be less than 2^31 in all, got {sum(lengths)}")
    return _on(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


def _on(x: Tensor, device: torch.device) -> Tensor:
    """From the host through pinned memory, or the copy would wait for everything that the GPU was given before."""
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _check_element(name: str, x: Any, first: Tensor) -> None:
    _checks.check_tensor(_OP, name, x)
    if x.dim() not in (2, 3):
        raise ValueError(f"{_OP}: {name} must be (N, C) or (B, N, C), got {_checks.shape(x)}")
    _checks.check_same_device(_OP, name, x, "tokens[0]", first)
    if x.shape[-1] != first.shape[-1]:
        raise ValueError(f"{_OP}: {name} must have C = {first.shape[-1]} of tokens[0], got {_checks.shape(x)}")
    if x.dtype != first.dtype:
        kinds = [str(t.dtype).removeprefix("torch.") for t in (first, x)]
        raise TypeError(f"{_OP}: {name} must have dtype {kinds[0]} of tokens[0], got dtype {kinds[1]}")


def _check_keep(keep: Any, num_kept: Any, tokens: Tensor) -> None:
    if not isinstance(keep, Tensor):
        raise TypeError(f"{_OP}: keep must be None or a Tensor, got {type(keep).__name__}")
    if keep.dtype != torch.bool:
        raise TypeError(f"{_OP}: keep must have dtype bool, got dtype {str(keep.dtype).removeprefix('torch.')}")
    _checks.check_strided(_OP, "keep", keep)
    if keep.shape != tokens.shape[:2]:
        wanted = f"(B, N) = {tuple(tokens.shape[:2])} of tokens"
        raise ValueError(f"{_OP}: keep must be {wanted}, got {_checks.shape(keep)}")
    if keep.device.type != "cpu":
        _checks.check_same_device(_OP, "keep", keep, "tokens", tokens)
    if num_kept is None:
        return
    if isinstance(num_kept, bool) or not isinstance(num_kept, int):
        raise TypeError(f"{_OP}: num_kept must be None or an int, got {type(num_kept).__name__}")
    if not 0 <= num_kept <= keep.numel():
        raise ValueError(f"{_OP}: num_kept must be from 0 to B·N = {keep.numel()}, got {num_kept}")


def _flatten(packed: PackedTokens) -> tuple[list[Any], tuple[Any, ...]]:
    kept = [] if packed.kept is None else [packed.kept]
    return [packed.values, packed.cu_seqlens, *kept], (packed.max_seqlen, packed._origin)


def _flatten_with_keys(packed: PackedTokens) -> tuple[list[Any], tuple[Any, ...]]:
    leaves, structure = _flatten(packed)
    names = ("values", "cu_seqlens", "kept")
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=False)], structure


def _unflatten(leaves: Any, structure: tuple[Any, ...]) -> PackedTokens:
    values, starts, *kept = leaves
    return PackedTokens(values, starts, structure[0], kept[0] if kept else None, structure[1])


pytree.register_pytree_node(
    PackedTokens,
    _flatten,
    _unflatten,
    serialized_type_name="fastssl.PackedTokens",
    flatten_with_keys_fn=_flatten_with_keys,
)
