"""Modules and losses that hold state, and the geometry of crops: what a training script composes."""

from fastssl.nn.crop_overlap import overlap_grids
from fastssl.nn.packed_attention import PackedAttention
from fastssl.nn.self_relation_head import SelfRelationHead
from fastssl.nn.self_relation_loss import SelfRelationLoss
from fastssl.nn.simpool import SimPool

__all__ = ["PackedAttention", "SelfRelationHead", "SelfRelationLoss", "SimPool", "overlap_grids"]
