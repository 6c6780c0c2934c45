"""fastssl: fused kernels for self-supervised vision transformers. `python -m fastssl info` says what runs where."""

from fastssl import nn
from fastssl._backends import Explanation, explain, use_backend
from fastssl.attention_overlay import attention_overlay
from fastssl.ops.gram_loss import gram_loss
from fastssl.ops.masked_attention import masked_attention
from fastssl.ops.packed_attention import packed_attention
from fastssl.ops.sample_tokens import sample_tokens
from fastssl.ops.self_relation import self_relation
from fastssl.ops.self_relation_loss import self_relation_loss
from fastssl.ops.simpool import simpool
from fastssl.packed_tokens import PackedTokens, pack

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "PackedTokens",
    "__version__",
    "attention_overlay",
    "explain",
    "gram_loss",
    "masked_attention",
    "nn",
    "pack",
    "packed_attention",
    "sample_tokens",
    "self_relation",
    "self_relation_loss",
    "simpool",
    "use_backend",
]
