"""fastssl.nn.SimPool: the module around the op, its keys, and the checkpoints that it takes."""

import copy
import logging
import pickle

import pytest
import torch
from compare import assert_close
from torch import nn

import fastssl
from fastssl.nn import SimPool
from fastssl.reference.simpool import simpool as reference

OPTIONS = [
    dict(),
    dict(num_heads=3),
    dict(qkv_bias=True),
    dict(gamma=1.25),
    dict(gamma=2.0, use_beta=True, qkv_bias=True, num_heads=2),
    dict(gamma=1.25, value_min="channel"),
]


def trained(**options):
    """Not as initialised: every parameter matters."""
    pool = SimPool(12, **options)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pool


@pytest.fixture(autouse=True)
def _on_each_backend(backend):
    with fastssl.use_backend(backend):
        yield


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layout", ["tokens", "map", "channels_last"])
def test_it_is_the_op_on_its_parameters(options, batch, layout):
    pool = trained(**options)
    tokens = torch.randn(batch, 35, 12)
    x = tokens.transpose(1, 2).reshape(batch, 12, 5, 7) if layout != "tokens" else tokens
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    p = {name: parameter.detach().double() for name, parameter in pool.named_parameters()}
    expected, attention = reference(
        tokens.double(), p["wq.weight"], p["wk.weight"], p["norm_patches.weight"], p["norm_patches.bias"],
        bq=p.get("wq.bias"), bk=p.get("wk.bias"), beta=p.get("beta"), num_heads=options.get("num_heads", 1),
        gamma=options.get("gamma"), value_min=options.get("value_min", "batch"),
    )  # fmt: skip
    pooled = pool(x)
    assert pooled.shape == (batch, 12)
    assert_close(pooled, expected, 1e-5)
    pool.return_attention = True
    again, weights = pool(x)
    assert torch.equal(again, pooled)
    assert_close(weights, attention, 1e-5)
    (again.square().sum() + weights.square().sum()).backward()
    # What is added to all of its tokens changes no softmax, and no distance to a channel's minimum.
    unseen = {"wk.bias", *(["norm_patches.bias"] if options.get("value_min") == "channel" else [])}
    for name, parameter in pool.named_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any() or name in unseen, name


def test_attention_is_of_tokens_in_the_order_of_the_map():
    pool = trained(num_heads=2, return_attention=True)
    x = torch.randn(3, 12, 4, 6)
    pooled, attention = pool(x)
    assert attention.shape == (3, 2, 24)
    values = pool.norm_patches(x.flatten(2).mT).unflatten(-1, (2, 6))
    expected = torch.einsum("bhn,bnhd->bhd", attention, values).flatten(1)
    torch.testing.assert_close(pooled, expected)


def test_initialised_as_the_published_layer():
    torch.manual_seed(3)
    pool = SimPool(12, qkv_bias=True, gamma=1.25, use_beta=True)
    torch.manual_seed(3)
    norm, wq, wk = nn.LayerNorm(12, eps=1e-6), nn.Linear(12, 12), nn.Linear(12, 12)
    for ours, theirs in ((pool.norm_patches, norm), (pool.wq, wq), (pool.wk, wk)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert pool.norm_patches.eps == 1e-6
    assert pool.beta.shape == ()
    assert pool.beta == 0


def test_keys_are_the_published_ones():
    keys = ["norm_patches.weight", "norm_patches.bias", "wq.weight", "wk.weight"]
    assert sorted(SimPool(8).state_dict()) == sorted(keys)
    full = SimPool(8, qkv_bias=True, gamma=2, use_beta=True)
    assert sorted(full.state_dict()) == sorted([*keys, "wq.bias", "wk.bias", "beta"])
    other = SimPool(8, qkv_bias=True, gamma=2, use_beta=True)
    other.load_state_dict(full.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(other(x), full(x))


def test_device_and_dtype():
    pool = SimPool(8, qkv_bias=True, gamma=2, use_beta=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in pool.parameters()} == {("meta", torch.bfloat16)}
    half = SimPool(8, gamma=1.25, dtype=torch.bfloat16)
    assert half(torch.randn(2, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert half(torch.randn(2, 5, 8)).dtype == torch.float32
    assert half.double()(torch.randn(2, 5, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("options", OPTIONS)
def test_copies_and_pickles(options):
    pool, x = trained(**options), torch.randn(2, 9, 12)
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(twin(x), pool(x))
        assert repr(twin) == repr(pool)


@pytest.mark.parametrize("options", [dict(), dict(gamma=1.25, use_beta=True, return_attention=True)])
def test_compiles_whole(options, backend):
    if backend == "cpp" and fastssl._library.module.cpu_path() != fastssl._library.module.supported_cpu_paths()[-1]:
        pytest.skip("once for the compiled library is enough")
    pool, x = trained(**options), torch.randn(2, 9, 12)
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), pool(x))
    wanted = torch.autograd.grad(torch.as_tensor(0) + sum(o.sum() for o in _all(pool(x))), list(pool.parameters()))
    got = torch.autograd.grad(torch.as_tensor(0) + sum(o.sum() for o in _all(compiled(x))), list(pool.parameters()))
    torch.testing.assert_close(got, wanted)


def _all(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_says_what_it_is():
    text = repr(SimPool(12, num_heads=3, gamma=1.25, value_min="channel"))
    assert "SimPool(\n  12, num_heads=3, qkv_bias=False, gamma=1.25, use_beta=False, value_min='channel'" in text


# ---- checkpoints -----------------------------------------------------------------------------------------------


def of_timm(pool, prefix=""):
    """Its state dict under timm's names."""
    names = {"norm_patches": "norm", "wq": "q", "wk": "k"}
    return {
        prefix + ".".join((names[key.partition(".")[0]], key.partition(".")[2])): value
        for key, value in pool.state_dict().items()
    }


class Nested(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.q = nn.Linear(2, 2)  # not the pool's: must be left alone
        self.pool = nn.ModuleDict({"a": pool, "b": SimPool(12)})


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_takes_keys_of_timm_and_says_so(biases, assign, caplog):
    source, target = trained(qkv_bias=biases), SimPool(12, qkv_bias=biases)
    state = of_timm(source)
    before = dict(state)
    with caplog.at_level(logging.WARNING):
        target.load_state_dict(state, assign=assign)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in before)
    x = torch.randn(2, 9, 12)
    assert torch.equal(target(x), source(x))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "norm.weight -> norm_patches.weight" in message
    assert ("q.bias -> wq.bias" in message) == biases


def test_takes_keys_of_timm_inside_a_model(caplog):
    source, model = trained(), Nested(SimPool(12))
    others = {key: value for key, value in model.state_dict().items() if not key.startswith("pool.a.")}
    state = others | of_timm(source, "pool.a.")
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(state, strict=True)
    assert len(caplog.records) == 1
    assert "pool.a.q.weight -> pool.a.wq.weight" in caplog.records[0].getMessage()
    x = torch.randn(2, 9, 12)
    assert torch.equal(model.pool["a"](x), source(x))
    assert "pool.a.q.weight" in state


def test_its_own_keys_are_loaded_without_a_word(caplog):
    with caplog.at_level(logging.DEBUG):
        SimPool(12).load_state_dict(trained().state_dict())
    assert caplog.records == []


@pytest.mark.parametrize("strict", [True, False])
def test_refuses_normalised_queries(strict):
    state = of_timm(trained()) | {"q_norm.weight": torch.ones(12), "k_norm.weight": torch.ones(12)}
    with pytest.raises(RuntimeError, match=r"SimPool: normalised queries and keys .*qk_norm.* 'k_norm.weight'"):
        SimPool(12).load_state_dict(state, strict=strict)


def test_refuses_what_does_not_belong():
    state = of_timm(trained())
    with pytest.raises(RuntimeError, match=r"size mismatch for wq\.weight"):
        SimPool(6).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"wq.bias"'):
        SimPool(12, qkv_bias=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"v.weight"'):
        SimPool(12).load_state_dict(state | {"v.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"q.weight"'):
        SimPool(12).load_state_dict(state | trained().state_dict())


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(dim=0), ValueError, "dim must be an int of at least 1, got 0"),
        (dict(dim=12.0), TypeError, "dim must be an int of at least 1, got float"),
        (dict(num_heads=5), ValueError, "num_heads must divide dim = 12, got 5"),
        (dict(num_heads=0), ValueError, "num_heads must be an int of at least 1, got 0"),
        (dict(qkv_bias=None), TypeError, "qkv_bias must be True or False, got NoneType"),
        (dict(gamma=-1), ValueError, "gamma must be a finite number greater than 0, got -1"),
        (dict(gamma="2"), TypeError, "gamma must be a finite number greater than 0, got str"),
        (dict(use_beta=True), ValueError, "use_beta must be False where gamma is None, got True"),
        (dict(value_min="min"), ValueError, "value_min must be one of 'batch', 'channel', got 'min'"),
        (dict(return_attention=2), TypeError, "return_attention must be True or False, got int"),
    ],
)
def test_refuses_arguments(arguments, error, message):
    with pytest.raises(error, match=f"^SimPool: {message}$"):
        SimPool(**({"dim": 12} | arguments))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a Tensor, got list"),
        (torch.ones(2, 5, 12).int(), TypeError, "x must have dtype .*, got dtype int32"),
        (torch.randn(5, 12), ValueError, r"x must be \(B, N, C\) or \(B, C, h, w\), got \(5, 12\)"),
        (torch.randn(2, 5, 11), ValueError, r"x must have C = 12 channels, got \(2, 5, 11\)"),
        (torch.randn(2, 5, 3, 12), ValueError, r"x must have C = 12 channels, got \(2, 5, 3, 12\)"),
        (torch.randn(2, 0, 12), ValueError, r"x must have at least one token and one channel, got \(2, 0, 12\)"),
        (torch.randn(2, 5, 12, device="meta"), ValueError, "wq must be on the device of x .meta., got cpu"),
    ],
)
def test_refuses_tokens(x, error, message):
    with pytest.raises(error, match=message):
        SimPool(12)(x)
