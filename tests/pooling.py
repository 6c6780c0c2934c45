"""What the tests of simpool share: inputs, the published formula, and the comparison with float64."""

import torch
import torch.nn.functional as F
from compare import assert_close, doubles
from tolerances import POOLED, POOLED_GRADIENT

import fastssl
from fastssl.reference.simpool import simpool as reference

NAMES = ("wq", "wk", "norm_weight", "norm_bias", "bq", "bk", "beta")


def make(batch, length, width, *, dtype=torch.float32, device="cpu", grad=True):
    """Tokens whose mean is not nothing, as a backbone's are not."""
    x = torch.randn(batch, length, width) + torch.randn(width)
    return x.to(device=device, dtype=dtype).requires_grad_(grad)


def parameters(width, *, biases=True, beta=True, dtype=torch.float32, device="cpu", grad=True):
    """Of a trained size: attention is not uniform, gain and bias are not 1 and 0."""
    made = {
        "wq": torch.randn(width, width) / width**0.5,
        "wk": torch.randn(width, width) / width**0.5,
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.3 * torch.randn(width),
    }
    if biases:
        made |= {"bq": 0.3 * torch.randn(width), "bk": torch.randn(width)}
    if beta:
        made["beta"] = torch.tensor(0.25)
    return {name: t.to(device=device, dtype=dtype).requires_grad_(grad) for name, t in made.items()}


def run(x, tensors, **options):
    """Pooled vectors and attention of one call."""
    return fastssl.simpool(x, **tensors, return_attention=True, **options)


def derivatives(outputs, x, tensors, upstream):
    """First derivatives of sum(pooled·u + attention·w) by name; of pooled alone where w is None."""
    leaves = {"x": x, **tensors}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    of, ups = zip(*pairs, strict=True)
    return dict(zip(wanted, torch.autograd.grad(of, list(wanted.values()), ups, allow_unused=True), strict=True))


def upstreams(outputs, attention=True):
    return [torch.randn_like(outputs[0]), torch.randn_like(outputs[1]) if attention else None]


def in_doubles(x, tensors):
    exact = doubles([x, *tensors.values()])
    return exact[0], dict(zip(tensors, exact[1:], strict=True))


def check(x, tensors, backend, *, attention=True, upstream=None, tolerances=None, **options):
    """Values and every gradient of one call against float64; returns pooled vectors, attention and the gradients.

    attention: whether the gradient also comes through the attention.
    """
    outputs = run(x, tensors, backend=backend, **options)
    exact_x, exact = in_doubles(x, tensors)
    truths = reference(
        exact_x,
        exact["wq"],
        exact["wk"],
        exact["norm_weight"],
        exact["norm_bias"],
        **{name: exact[name] for name in ("bq", "bk", "beta") if name in exact},
        **options,
    )
    forward, gradient = tolerances or (POOLED[x.dtype], None)
    for what, got, truth in zip(("pooled", "attention"), outputs, truths, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, truth, forward, what)
    if not outputs[0].requires_grad:
        return *outputs, {}
    upstream = upstreams(outputs, attention) if upstream is None else upstream
    exact_upstream = [None if u is None else u.detach().cpu().double() for u in upstream]
    got = derivatives(outputs, x, tensors, upstream)
    expected = derivatives(truths, exact_x, exact, exact_upstream)
    for name, of in got.items():
        leaf = x if name == "x" else tensors[name]
        wanted = torch.zeros_like(leaf) if expected[name] is None else expected[name]
        assert of.dtype == leaf.dtype
        assert_close(of, wanted, gradient or POOLED_GRADIENT[leaf.dtype], f"gradient of {name}")
    return *outputs, got


def plain(
    x, wq, wk, norm_weight, norm_bias, *, bq=None, bk=None, beta=None, num_heads=1, gamma=None, value_min="batch"
):
    """The published layer as its authors write it, in the dtype of its arguments."""
    batch, length, width = x.shape
    head = width // num_heads
    y = F.layer_norm(x, (width,), norm_weight, norm_bias, 1e-6)
    q = F.linear(x.mean(1, keepdim=True), wq, bq).reshape(batch, 1, num_heads, head).permute(0, 2, 1, 3)
    k = F.linear(y, wk, bk).reshape(batch, length, num_heads, head).permute(0, 2, 1, 3)
    v = y.reshape(batch, length, num_heads, head).permute(0, 2, 1, 3)
    attention = ((q @ k.transpose(-2, -1)) * head**-0.5).softmax(-1)
    if gamma is None:
        pooled = attention @ v
    else:
        smallest = v.min() if value_min == "batch" else v.amin(2, keepdim=True)
        pooled = (attention @ (v - smallest + 1e-6) ** gamma) ** (1 / gamma)
        if beta is not None:
            pooled = pooled + beta
    return pooled.transpose(1, 2).reshape(batch, width), attention[:, :, 0]
