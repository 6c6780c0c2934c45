"""simpool's Triton kernels under Triton's interpreter, against float64. Products are of float32, so bfloat16 is tested
too, which the interpreter cannot multiply."""

import itertools

import pytest
import torch
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.simpool import simpool as reference

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
POWERS = {
    "plain": dict(),
    "1.25 of the batch": dict(gamma=1.25),
    "2 of the batch": dict(gamma=2.0),
    "1.25 of each channel": dict(gamma=1.25, value_min="channel"),
    "2 of each channel": dict(gamma=2.0, value_min="channel"),
}
EVERY_POWER = pytest.mark.parametrize("power", POWERS)
SOME_POWERS = pytest.mark.parametrize("power", ["plain", "2 of the batch", "1.25 of each channel"])
PARAMETERS = ("wq", "wk", "norm_weight", "norm_bias", "bq", "bk", "beta")


def make(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def parameters(width, power="plain", dtype=torch.float32, biases=True):
    """Everything that is learned, as keyword arguments."""
    drawn = {
        "wq": torch.randn(width, width) / width**0.5,
        "wk": torch.randn(width, width) / width**0.5,
        "norm_weight": 1 + 0.2 * torch.randn(width),
        "norm_bias": 0.2 * torch.randn(width),
    }
    if biases:
        drawn |= {"bq": 0.2 * torch.randn(width), "bk": 0.2 * torch.randn(width)}
        if power != "plain":
            drawn["beta"] = torch.tensor([0.3])
    return {name: value.to(dtype).requires_grad_() for name, value in drawn.items()}


def check(x, learned, *, upstream=None, tolerances=None, attention=True, **kwargs):
    """Pooled vectors, attention and all gradients of one call. tolerances: forward, gradient."""
    results = fastssl.simpool(x, **learned, return_attention=True, backend="triton", **kwargs)
    inputs = [x, *learned.values()]
    exact = doubles(inputs)
    truths = reference(exact[0], **dict(zip(learned, exact[1:], strict=True)), **kwargs)
    forward, gradient = tolerances or (FORWARD[x.dtype], GRADIENT[x.dtype])
    for name, got, truth in zip(("pooled", "attention"), results, truths, strict=True):
        assert got.dtype == x.dtype
        assert got.is_contiguous()
        assert_close(got, truth, forward, name)
    upstream = upstream or [torch.randn_like(r) for r in results]
    count = 1 + attention
    chosen = [t.requires_grad for t in inputs]
    got = torch.autograd.grad(results[:count], [t for t in inputs if t.requires_grad], upstream[:count])
    expected = torch.autograd.grad(
        truths[:count], [t for t in exact if t.requires_grad], [u.double() for u in upstream[:count]]
    )
    names = itertools.compress(("x", *learned), chosen)
    for name, g, e, leaf in zip(names, got, expected, itertools.compress(inputs, chosen), strict=True):
        assert g.dtype == leaf.dtype
        if name == "bk":
            assert not g.any()
        else:
            assert_close(g, e, max(gradient, GRADIENT[leaf.dtype]), f"gradient of {name}")
    return results


# ---- values and gradients --------------------------------------------------------------------------------------


@DTYPES
@EVERY_POWER
@pytest.mark.parametrize(
    ("length", "width", "heads"),
    [(1, 33, 1), (37, 33, 1), (37, 48, 3), pytest.param(100, 48, 3, marks=pytest.mark.proof)],
)
def test_lengths_and_heads(dtype, power, length, width, heads):
    check(make(2, length, width, dtype=dtype), parameters(width, power), num_heads=heads, **POWERS[power])


@SOME_POWERS
@pytest.mark.parametrize("heads", [1, pytest.param(3, marks=pytest.mark.proof)])
def test_several_chunks(power, heads):
    check(make(2, 196, 48), parameters(48, power), num_heads=heads, **POWERS[power])


@pytest.mark.parametrize(
    ("power", "heads", "dtype"),
    [("plain", 1, torch.float16), pytest.param("2 of the batch", 3, torch.float32, marks=pytest.mark.proof)],
)
def test_the_shape_of_a_small_transformer(power, heads, dtype):
    check(make(1, 196, 384, dtype=dtype), parameters(384, power), num_heads=heads, **POWERS[power])


@pytest.mark.parametrize("width", [130, pytest.param(300, marks=pytest.mark.proof)])
@SOME_POWERS
def test_wider_tiles(width, power):
    check(make(1, 19, width), parameters(width, power), num_heads=2, **POWERS[power])


@SOME_POWERS
@pytest.mark.parametrize("heads", [1, pytest.param(2, marks=pytest.mark.proof)])
def test_many_chunks(monkeypatch, power, heads):
    """More than the products add up, and more minima than every program would read."""
    from fastssl.kernels import simpool, simpool_tiles

    monkeypatch.setattr(simpool_tiles, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(simpool, "MOST_MINIMA", 3)
    check(make(1, 300, 20), parameters(20, power), num_heads=heads, **POWERS[power])


def test_no_more_chunks_than_most(monkeypatch):
    from fastssl.kernels import simpool_tiles

    monkeypatch.setattr(simpool_tiles, "MOST_CHUNKS", 2)
    check(make(1, 300, 20), parameters(20))


@SOME_POWERS
def test_without_biases_and_attention(power):
    check(make(2, 37, 33), parameters(33, power, biases=False), attention=False, **POWERS[power])


@EVERY_POWER
def test_attention_alone_has_a_gradient(power):
    learned = parameters(24, power)
    x = make(2, 37, 24)
    attention = fastssl.simpool(x, **learned, return_attention=True, backend="triton", **POWERS[power])[1]
    exact = doubles([x, *learned.values()])
    truth = reference(exact[0], **dict(zip(learned, exact[1:], strict=True)), **POWERS[power])[1]
    upstream = torch.randn_like(attention)
    (got,) = gradients(attention, [x], upstream)
    assert_close(got, gradients(truth, exact[:1], upstream.double())[0], GRADIENT[x.dtype])


@pytest.mark.parametrize("scale", [-0.3, 2.0])
def test_scale(scale):
    check(make(2, 37, 33), parameters(33), scale=scale)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("power", ["plain", "1.25 of each channel"])
def test_dtypes_of_parameters(dtype, given, power):
    check(make(2, 19, 24, dtype=dtype), parameters(24, power, given), num_heads=2, **POWERS[power])


@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-6), (0.5, 1e-6), (3.7, 1e-6), (6.0, 1e-6), (2.0, 0.1)])
def test_exponents(gamma, eps):
    check(make(2, 19, 24), parameters(24, "power"), gamma=gamma, eps=eps, value_min="channel")


# ---- hard numbers ----------------------------------------------------------------------------------------------


@SOME_POWERS
@pytest.mark.parametrize("heads", [1, 2])
def test_logits_of_ten_thousand_stay_finite(power, heads):
    x, learned = make(2, 37, 24), parameters(24, power)
    # float32 keeps such logits to ±1e-3, which becomes the relative error of each share.
    out, attention = fastssl.simpool(
        x, **learned, num_heads=heads, scale=1e4, return_attention=True, backend="triton", **POWERS[power]
    )
    exact = doubles([x, *learned.values()])
    truth = reference(
        exact[0], **dict(zip(learned, exact[1:], strict=True)), num_heads=heads, scale=1e4, **POWERS[power]
    )
    assert_close(out, truth[0], 1e-2)
    assert_close(attention, truth[1], 1e-2)
    for grad in torch.autograd.grad(out.sum() + attention.square().sum(), [x, *learned.values()]):
        assert torch.isfinite(grad).all()


@SOME_POWERS
def test_a_large_mean_of_all_tokens(power):
    """float32 keeps such tokens to 4e-6, and their query to as much of its hundredfold length."""
    x = (torch.randn(2, 60, 33) + 100).requires_grad_()
    check(x, parameters(33, power), tolerances=(1e-5, 5e-5), scale=0.02, **POWERS[power])


@EVERY_POWER
@pytest.mark.parametrize("heads", [1, 3])
def test_constant_input(power, heads):
    x = torch.full((2, 37, 48), 0.5).requires_grad_()
    _, attention = check(x, parameters(48, power), num_heads=heads, **POWERS[power])
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 37))


@EVERY_POWER
def test_ties_of_the_minimum_share_its_gradient(power):
    tokens = torch.randn(2, 13, 24)
    x = tokens.repeat(1, 3, 1).requires_grad_()
    check(x, parameters(24, power), **POWERS[power])


@pytest.mark.parametrize("power", ["2 of the batch", "2 of each channel"])
def test_channels_without_weight_tie_everywhere(power):
    learned = parameters(24, power)
    with torch.no_grad():
        learned["norm_weight"][5] = 0
        learned["norm_bias"][5] = -9
    check(make(2, 37, 24), learned, **POWERS[power])


# ---- strides ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "map": lambda: torch.randn(2, 24, 3, 5),
    "even map": lambda: torch.randn(2, 32, 4, 4),
    "wide map": lambda: torch.randn(1, 260, 2, 5),
    "channels last": lambda: torch.randn(2, 24, 3, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 24, 15).transpose(1, 2),
    "batch second": lambda: torch.randn(15, 2, 24).transpose(0, 1),
    "without class token": lambda: torch.randn(2, 17, 32)[:, 1:],
    "sliced": lambda: torch.randn(3, 17, 50)[1:, 1:, 7:31],
    "expanded": lambda: torch.randn(1, 15, 24).expand(2, -1, -1),
    "strided": lambda: torch.randn(2, 30, 48)[:, ::2, ::2],
}


def width_of(x):
    return x.shape[1] if x.dim() == 4 else x.shape[2]


@SOME_POWERS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(power, layout):
    x = LAYOUTS[layout]().requires_grad_()
    check(x, parameters(width_of(x), power), num_heads=2, **POWERS[power])


@pytest.mark.parametrize("layout", ["map", "batch second"])
@pytest.mark.parametrize("power", ["plain", "2 of the batch"])
def test_strides_too_long_for_offsets_of_32_bits(monkeypatch, layout, power):
    """Such tokens are copied, and so is their gradient on its way back."""
    from fastssl.kernels import simpool_tiles

    monkeypatch.setattr(simpool_tiles, "LONGEST_TILE", 14)
    x = LAYOUTS[layout]().requires_grad_()
    check(x, parameters(width_of(x), power), **POWERS[power])


@SOME_POWERS
def test_upstream_gradients_of_any_strides(power):
    x, learned = make(2, 19, 24), parameters(24, power)
    for upstream in (
        [torch.tensor(0.7).expand(2, 24), torch.randn(19).expand(2, 3, 19)],
        [torch.randn(24, 2).t(), torch.randn(2, 19, 3).transpose(1, 2)],
        [torch.randn(2, 48)[:, ::2], torch.randn(2, 3, 40)[..., 2::2]],
    ):
        check(x, learned, upstream=upstream, num_heads=3, **POWERS[power])


@SOME_POWERS
def test_strides_of_parameters(power):
    learned = parameters(24, power)
    learned["wq"] = torch.randn(24, 24).t().requires_grad_()
    learned["wk"] = torch.randn(30, 50)[3:27, 1:49:2].requires_grad_()
    for name in ("norm_weight", "norm_bias", "bq"):
        learned[name] = torch.randn(48)[::2].requires_grad_()
    check(make(2, 19, 24), learned, scale=0.05, **POWERS[power])


# ---- sizes of nothing, and what is asked for ------------------------------------------------------------------


@EVERY_POWER
def test_empty_batch(power):
    out, attention = check(make(0, 7, 6), parameters(6, power), num_heads=2, **POWERS[power])
    assert out.shape == (0, 6)
    assert attention.shape == (0, 2, 7)


@SOME_POWERS
def test_one_channel(power):
    check(make(3, 5, 1), parameters(1, power), **POWERS[power])


def test_an_image_of_a_plain_call_does_not_depend_on_the_others():
    x, learned = make(3, 50, 33), parameters(33)
    whole = fastssl.simpool(x, **learned, backend="triton")
    assert torch.equal(fastssl.simpool(x[1:2], **learned, backend="triton"), whole[1:2])


def raw_arguments(power, batch=2, length=37, width=24, heads=2):
    x, learned = make(batch, length, width).detach(), parameters(width, power)
    learned = {name: value.detach() for name, value in learned.items()}
    options = POWERS[power]
    tensors = [x, *(learned.get(n, x.new_empty(0)) for n in ("wq", "bq", "wk", "norm_weight", "norm_bias", "beta"))]
    channel = int(options.get("value_min") == "channel")
    return (*tensors, heads, 0.3, options.get("gamma", 0.0), channel, 1e-6, 1e-6)


@EVERY_POWER
@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_only_wanted_gradients_are_computed(power, wanted):
    arguments = raw_arguments(power)
    out, attention, *kept = torch.ops.fastssl.simpool_forward_triton(*arguments)
    run = torch.ops.fastssl.simpool_backward_triton
    upstream = (torch.randn_like(out), torch.randn_like(attention))
    everything, parts = run(*upstream, *kept, *arguments, 3), run(*upstream, *kept, *arguments, wanted)
    for index, (part, all_of_it) in enumerate(zip(parts, everything, strict=True)):
        is_wanted = wanted & 1 if index == 0 else wanted & 2
        assert torch.equal(part, all_of_it) if is_wanted else part.shape == (0,)


@EVERY_POWER
@pytest.mark.parametrize("heads", [1, 2])
def test_repeatable_and_leaves_its_inputs_alone(power, heads):
    arguments = raw_arguments(power, length=100, heads=heads)
    upstream = (torch.randn(2, 24), torch.randn(2, heads, 100))
    tensors = [*upstream, *(a for a in arguments if isinstance(a, torch.Tensor))]
    before = [t.clone() for t in tensors]
    runs = []
    for _ in range(2):
        results = torch.ops.fastssl.simpool_forward_triton(*arguments)
        kept = [r.clone() for r in results[2:]]
        runs.append((*results, *torch.ops.fastssl.simpool_backward_triton(*upstream, *results[2:], *arguments, 3)))
        assert all(torch.equal(one, two) for one, two in zip(kept, results[2:], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, tensors, strict=True))


@pytest.mark.parametrize("batch", [0, 2])
@SOME_POWERS
def test_opcheck(batch, power):
    arguments = raw_arguments(power, batch=batch, length=9, width=6)
    torch.library.opcheck(torch.ops.fastssl.simpool_forward_triton, arguments)
    out, attention, *kept = torch.ops.fastssl.simpool_forward_triton(*arguments)
    upstream = (torch.randn_like(out), torch.randn_like(attention))
    for wanted in (1, 2, 3):
        torch.library.opcheck(torch.ops.fastssl.simpool_backward_triton, (*upstream, *kept, *arguments, wanted))


# ---- what is kept ----------------------------------------------------------------------------------------------


@EVERY_POWER
def test_what_is_kept_for_the_backward(power):
    """Every backend keeps the same, so that one's backward could follow another's forward."""
    arguments = raw_arguments(power)
    mine = torch.ops.fastssl.simpool_forward_triton(*arguments)
    x, wq, bq, wk, weight, bias, _, heads, scale, gamma, channel_min, eps, norm_eps = arguments
    _, _, rows, vectors, minimum = (r.double() for r in mine)
    x, wq, bq, wk, weight, bias = (t.double() for t in (x, wq, bq, wk, weight, bias))
    mean, deviation = x.mean(2), (x.var(2, unbiased=False) + norm_eps).sqrt()
    unit = (x - mean[..., None]) / deviation[..., None]
    y = unit * weight + bias
    q = x.mean(1) @ wq.t() + bq
    u = torch.einsum("bhd,hdc->bhc", q.unflatten(1, (heads, -1)), wk.unflatten(0, (heads, -1)))
    logits = scale * torch.einsum("bhc,bnc->bhn", u * weight - (u * weight).mean(2, keepdim=True), unit)
    attention = logits.softmax(-1)
    values = unit
    if gamma:
        least = y.amin(1) if channel_min else y.amin().reshape(1)
        assert_close(minimum, least, 1e-6)
        values = (y - (least[:, None] if channel_min else least) + eps) ** gamma
    pooled = torch.einsum("bhn,bnhd->bhd", attention, values.unflatten(2, (heads, -1))).flatten(1)
    expected = torch.cat([mean[:, None], 1 / deviation[:, None], logits, attention], 1)
    for row in range(expected.shape[1]):
        assert_close(rows[:, row], expected[:, row], FORWARD[torch.float32], f"row {row}")
    for row, vector in enumerate((x.mean(1), q, pooled)):
        assert_close(vectors[:, row], vector, FORWARD[torch.float32], f"vector {row}")
    assert_close(vectors[:, 3:], u, FORWARD[torch.float32])


# ---- the tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_choice_is_compiled_by_the_proofs(kind):
    """That is, whatever the tables choose is among the configurations, with one minimum or the other."""
    from fastssl.kernels import simpool, simpool_backward, simpool_products
    from fastssl.kernels.simpool_tiles import Tiling

    modules = (simpool, simpool_backward, simpool_products)
    configurations = [c for module in modules for c in module.configurations()]
    assert len({c.description for c in configurations}) == len(configurations)

    def key(choice):
        constants = {**choice.constexprs}
        if "BLOCK_CHANNELS" in constants and "MINIMUM" in constants:
            constants["MINIMUM"] = constants["MINIMUM"] > 0
        return (choice.kernel.__name__, *sorted(constants.items()), choice.num_warps, choice.num_stages)

    compiled = {key(c) for c in configurations}
    for width in (1, 33, 128, 192, 384, 768, 1000, 1536, 2048):
        for plain, many in ((True, False), (False, False), (False, True)):
            tiling = Tiling.of(width, plain, kind > 0)
            # A feature map of few tokens a tile is copied.
            if plain or many or tiling.block_tokens >= 8:
                flags = {"MINIMUM": kind, "MANY": int(many)}
                assert key(tiling.choice(simpool.token_statistics, MINIMUM=kind)) in compiled
                for kernel in (simpool.attend, simpool_backward.grad_logits, simpool_backward.grad_tokens):
                    assert key(tiling.choice(kernel, **flags)) in compiled
    for chunks in (1, 2, 8):
        assert key(simpool_products.folding_choice(simpool_products.queries, chunks)) in compiled
        assert key(simpool_products.folding_choice(simpool_products.grad_queries, chunks, MINIMUM=kind)) in compiled
    assert key(simpool_products.product_choice(simpool_products.folded_queries)) in compiled
    assert key(simpool_products.product_choice(simpool_products.grad_parameters, MINIMUM=kind)) in compiled
    assert key(simpool.finish_choice(kind > 0)) in compiled
