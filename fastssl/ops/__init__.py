"""The ops: one file each. Importing this package registers them."""

from fastssl.ops import gram_loss as gram_loss
from fastssl.ops import masked_attention as masked_attention
from fastssl.ops import packed_attention as packed_attention
from fastssl.ops import sample_tokens as sample_tokens
from fastssl.ops import self_relation as self_relation
from fastssl.ops import self_relation_loss as self_relation_loss
from fastssl.ops import simpool as simpool
