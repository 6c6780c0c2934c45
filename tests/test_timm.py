"""SimPool beside timm's, and inside timm's models.

timm's SimPool1d and SimPool2d are this layer, with `value_min="channel"`, but for: the eps of their LayerNorm, 1e-5
instead of the published 1e-6, which the tests set where numbers are to be equal; their product with the attention,
F.scaled_dot_product_attention, which rounds elsewhere; and qk_norm, which is not here. The minimum of the whole batch,
as the paper's code has it, is not in timm.
"""

import logging

import pytest
import torch
from compare import assert_close, relative_error
from tolerances import POOLED, POOLED_GRADIENT
from with_timm import import_timm, why_not

import fastssl
from fastssl import _library
from fastssl.nn import SimPool

_reason = why_not()
pytestmark = pytest.mark.skipif(_reason is not None, reason=_reason or "timm is here")
if _reason is None:
    timm = import_timm()
    from timm.layers import SimPool1d, SimPool2d

OPTIONS = [dict(num_heads=h, qkv_bias=b, gamma=g) for h in (1, 4) for b in (False, True) for g in (None, 1.25, 2.0)]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def _on_each_backend(request):
    if request.param == "cpp" and not _library.loaded():
        pytest.skip(_library.why_not)
    with fastssl.use_backend(request.param):
        yield


def trained(kind, dtype=torch.float32, **options):
    """A layer of timm's whose every parameter matters."""
    layer = kind(48, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens_of(kind, dtype=torch.float32, batch=3):
    x = torch.randn(batch, 35, 48, dtype=dtype) + torch.randn(48, dtype=dtype)
    return x if kind is SimPool1d else x.mT.reshape(batch, 48, 5, 7)


@pytest.fixture(params=["SimPool1d", "SimPool2d"])
def kind(request):
    return {"SimPool1d": SimPool1d, "SimPool2d": SimPool2d}[request.param]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
def test_the_op_is_that_of_timm(kind, options, dtype, fused):
    layer, x = trained(kind, dtype, **options), tokens_of(kind, dtype).requires_grad_()
    layer.fused_attn = fused
    expected = layer(x)
    got = fastssl.simpool(
        x, layer.q.weight, layer.k.weight, layer.norm.weight, layer.norm.bias, bq=layer.q.bias, bk=layer.k.bias,
        num_heads=options["num_heads"], gamma=options["gamma"], value_min="channel", norm_eps=layer.norm.eps,
    )  # fmt: skip
    assert_close(got, expected, POOLED[dtype])
    leaves = [x, layer.q.weight, layer.k.weight, layer.norm.weight]
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        assert_close(ours, theirs, POOLED_GRADIENT[dtype])


@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_takes_a_state_dict_of_timm(kind, options, caplog):
    layer, pool = trained(kind, **options), SimPool(48, value_min="channel", **options)
    with caplog.at_level(logging.WARNING):
        pool.load_state_dict(layer.state_dict())
    assert "norm.weight -> norm_patches.weight" in caplog.text
    x = tokens_of(kind)
    expected = layer(x)
    assert 1e-7 < relative_error(pool(x), expected) < 1e-4  # eps of the LayerNorm
    pool.norm_patches.eps = layer.norm.eps
    assert_close(pool(x), expected, POOLED[torch.float32])


def test_normalised_queries_are_refused(kind):
    with pytest.raises(RuntimeError, match=r"timm's qk_norm\) are not supported, got \['q_norm.weight'"):
        SimPool(48).load_state_dict(kind(48, qk_norm=True).state_dict())


# ---- inside models ---------------------------------------------------------------------------------------------


def vit(**options):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=10, **options
    )


@pytest.mark.parametrize("options", [dict(), dict(reg_tokens=4), dict(class_token=False, global_pool="avg")])
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_pools_a_vit(options, gamma):
    model = vit(**options)
    model.attn_pool = SimPool(model.embed_dim, gamma=gamma)
    seen = []
    model.attn_pool.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    assert logits.shape == (2, 10)
    assert seen == [(2, 16, 48)]  # without class and register tokens
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    for name, parameter in model.attn_pool.named_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name
    assert model.patch_embed.proj.weight.grad.any()
    features = model.forward_features(images)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(
        model.forward_head(features_of(model, features), pre_logits=True), pooled(model, features)
    )
    model.reset_classifier(7)
    assert isinstance(model.attn_pool, SimPool)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, 48)
    state = model.state_dict()
    assert "attn_pool.norm_patches.weight" in state


def features_of(model, patches):
    """All tokens again: what precedes the patches is not looked at."""
    return torch.cat([torch.full((len(patches), model.num_prefix_tokens, 48), 9.0), patches], 1)


def pooled(model, patches):
    return model.fc_norm(model.attn_pool(patches))


def test_replaces_the_attention_pooling_of_a_vit():
    model = vit(class_token=False, global_pool="map")
    model.attn_pool = SimPool(model.embed_dim, num_heads=3)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 10)
    model.reset_classifier(5, "map")
    assert isinstance(model.attn_pool, SimPool)
    assert model(images).shape == (2, 5)
    model.reset_classifier(5, "avg")  # as timm has it: another pooling removes this one
    assert model.attn_pool is None
    assert model(images).shape == (2, 5)


def test_a_checkpoint_of_a_vit_with_timms_layer(caplog):
    theirs, ours = vit(), vit()
    theirs.attn_pool, ours.attn_pool = trained(SimPool1d), SimPool(48)
    ours.attn_pool.norm_patches.eps = theirs.attn_pool.norm.eps
    with caplog.at_level(logging.WARNING):
        ours.load_state_dict(theirs.state_dict(), strict=True)
    assert "attn_pool.q.weight -> attn_pool.wq.weight" in caplog.text
    images = torch.randn(2, 3, 64, 64)
    assert_close(ours(images), theirs(images), POOLED[torch.float32])


@pytest.mark.parametrize("channels_last", [False, True])
def test_pools_a_convolutional_network(channels_last):
    model = timm.create_model("resnet18", num_classes=10)
    images = torch.randn(2, 3, 96, 64)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    pool = SimPool(model.num_features, gamma=2.0, return_attention=True)
    features = model.forward_features(images)
    assert features.shape == (2, 512, 3, 2)
    vectors, attention = pool(features)
    assert vectors.shape == (2, 512)
    assert attention.shape == (2, 1, 6)
    pool.return_attention = False
    model.global_pool = pool
    logits = model(images)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in pool.parameters())
