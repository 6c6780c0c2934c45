"""Ground shared by the Triton kernels: strided views of tokens, tiles, launches, and how configurations are written.

Every address is a 64-bit base of the program's block plus 32-bit offsets inside the block: 64-bit offsets per element
would cost so many registers that rows of logits no longer fit. A tile spans at most 512 strides of one axis and 256 of
the other, hence LONGEST_STRIDE; tensors with longer ones are copied, and matrices have fewer than 2^24 columns.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_STRIDE = 2**21
LOG2E = math.log2(math.e)


class Vectors(NamedTuple):
    """(B, H, rows, depth) vectors lying anywhere in a tensor."""

    tensor: Tensor
    batch: int
    num_heads: int
    rows: int
    depth: int
    strides: tuple[int, int, int, int]  # of image, head, row and depth, in elements

    @staticmethod
    def of_tokens(x: Tensor, channel: int, num_heads: int) -> Vectors:
        """x (B, N, C), or a copy of it: its tokens per head, or, for `channel`, its channels per head."""
        batch, length, width = x.shape
        if max(x.stride()[1:]) > LONGEST_STRIDE:
            x = x.contiguous()
        image, token, feature = x.stride()
        size = width // num_heads
        if channel:
            return Vectors(x, batch, num_heads, size, length, (image, size * feature, feature, token))
        return Vectors(x, batch, num_heads, length, size, (image, size * feature, token, feature))

    def like(self, tensor: Tensor) -> Vectors:
        """The same vectors in a contiguous (B, H, rows, depth) tensor."""
        one = self.rows * self.depth
        return self._replace(tensor=tensor, strides=(self.num_heads * one, one, self.depth, 1))

    def smooth(self) -> bool:
        """Whether the compiler can read them as 16-byte vectors: it learns of each integer whether 16 divides it."""
        image, head, row, depth = self.strides
        if depth == 1:
            others = math.gcd(image, head, row, self.depth)
        elif row == 1:
            others = math.gcd(image, head, depth, self.rows)
        else:
            return False
        return others % 16 == 0 and self.tensor.data_ptr() % 16 == 0


@triton.jit
def load_tile(base, i, j, I, J, stride_i, stride_j, WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr):
    """Elements i … i + WIDTH_I, j … j + WIDTH_J of the (I, J) matrix at base, zero outside."""
    base += tl.cast(i, tl.int64) * stride_i + tl.cast(j, tl.int64) * stride_j
    at_i = tl.arange(0, WIDTH_I)[:, None]
    at_j = tl.arange(0, WIDTH_J)[None, :]
    return tl.load(base + (at_i * stride_i + at_j * stride_j), mask=(at_i < I - i) & (at_j < J - j), other=0.0)


@triton.jit
def load_vector(base, i, I, stride, WIDTH: tl.constexpr):
    """Elements i … i + WIDTH of the vector at base, zero outside.

    For what a tile has one of per row, or per column: loaded as a tile of one column, in the layout of the others, each
    thread would read it once for every element that it has of the row.
    """
    at = tl.arange(0, WIDTH)
    return tl.load(base + tl.cast(i, tl.int64) * stride + at * stride, mask=at < I - i, other=0.0)


@triton.jit
def store_tile(base, value, i, j, I, J, stride_i, stride_j, WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr):
    """The counterpart of load_tile; rounds to the dtype of base."""
    base += tl.cast(i, tl.int64) * stride_i + tl.cast(j, tl.int64) * stride_j
    at_i = tl.arange(0, WIDTH_I)[:, None]
    at_j = tl.arange(0, WIDTH_J)[None, :]
    at = at_i * stride_i + at_j * stride_j
    tl.store(base + at, value.to(base.dtype.element_ty), mask=(at_i < I - i) & (at_j < J - j))


@triton.jit
def multiply(a, b, accumulator, MIXED: tl.constexpr):
    """accumulator + a b in float32. MIXED: a and b may differ in dtype and are converted to float32 first.

    bfloat16 and float16 go to the tensor cores as they are. float32 is multiplied with "ieee", on the ordinary cores:
    TF32 would keep 10 bits of each operand, far outside the promised 2e-6 (2e-5 for gradients).
    """
    if MIXED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def gram_tile(
    rows,  # (I, K) matrix by its strides
    columns,  # (J, K) matrix by its strides
    i, j, I, J, K, row_i, row_depth, column_j, column_depth,
    WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr, BLOCK_DEPTH: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Elements i … i + WIDTH_I, j … j + WIDTH_J of rows · columnsᵀ in float32, zero outside."""
    products = tl.zeros([WIDTH_I, WIDTH_J], tl.float32)
    for start in range(0, K, BLOCK_DEPTH):
        a = load_tile(rows, i, start, I, K, row_i, row_depth, WIDTH_I, BLOCK_DEPTH)
        b = load_tile(columns, start, j, K, J, column_depth, column_j, BLOCK_DEPTH, WIDTH_J)
        products = multiply(a, b, products, MIXED)
    return products


def product_dtype(x: Tensor, columns: Tensor) -> torch.dtype:
    """In which the two are multiplied."""
    return x.dtype if x.dtype == columns.dtype else torch.float32


class Choice(NamedTuple):
    """A kernel and what its launch fixes at compile time."""

    kernel: Any
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int


def launch(choice: Choice, programs: int, *arguments: Any) -> None:
    if programs > 0:
        choice.kernel[(programs,)](
            *arguments, **choice.constexprs, num_warps=choice.num_warps, num_stages=choice.num_stages
        )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def architecture(tensor: Tensor) -> int:
    """90 on an H100; 0 without a GPU. One of a family has its kernels: 103 counts as 100."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 100 if (major, minor) == (10, 3) else 10 * major + minor


def alignment(*counts: int) -> int:
    """A divisor of all counts worth telling a kernel: 4 or 1. That 16 divides them the compiler finds out by itself."""
    divisor = math.gcd(*counts)
    return 4 if divisor % 4 == 0 and divisor % 16 != 0 else 1


class Configuration(NamedTuple):
    """One compilation, as data: `configurations()` of a kernel module yields every one that its tables can choose.

    A signature maps each argument that is no constexpr to its type in the notation of triton.tools.compile: "*bf16:16"
    is a pointer to bfloat16 divisible by 16, "i32:16" an integer divisible by 16, "i32:1" the integer 1.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int
    description: str
    archs: tuple[int, ...] = ()  # only there; () means anywhere


def configuration(choice: Choice, description: str, *types: str) -> Configuration:
    """types: of the arguments in order, several to a string, separated by spaces."""
    names = [name for name in choice.kernel.arg_names if name not in choice.constexprs]
    signature = dict(zip(names, " ".join(types).split(), strict=True))
    sizes = ",".join(f"{name}={value}" for name, value in choice.constexprs.items())
    text = f"{choice.kernel.__name__}[{sizes},warps={choice.num_warps},stages={choice.num_stages}] {description}"
    return Configuration(choice.kernel, signature, choice.constexprs, choice.num_warps, choice.num_stages, text)


class Layout(NamedTuple):
    """Types of arguments as they come with one kind of tokens."""

    smooth: bool
    strides: str  # of image, head, row and depth
    count: str  # of rows, hence also the row length of relations between them
    depth: str
    num_heads: str


#: Tokens and channels of a contiguous x; the least that can be known, which costs most registers; then two to sample:
#: a feature map of odd size, and one token of one head of one feature, where triton makes every integer a constant.
LAYOUTS = {
    "tokens": Layout(True, "i32:16 i32:16 i32:16 i32:1", "i32", "i32:16", "i32"),
    "channels": Layout(True, "i32:16 i32:16 i32:1 i32:16", "i32:16", "i32", "i32"),
    "odd width": Layout(False, "i32 i32 i32 i32:1", "i32", "i32", "i32"),
    "odd map": Layout(False, "i32 i32 i32:1 i32", "i32", "i32:16", "i32:1"),
    "single": Layout(False, "i32:1 i32:1 i32:1 i32:1", "i32:1", "i32:1", "i32:1"),
}

#: Triton's names of the dtypes.
DTYPES = ("bf16", "fp16", "fp32")

#: Every block size is compiled for these; float16, which differs from bfloat16 in opcodes alone, is sampled.
THOROUGH = tuple((dtype, layout) for dtype in ("bf16", "fp32") for layout in ("tokens", "channels", "odd width"))
