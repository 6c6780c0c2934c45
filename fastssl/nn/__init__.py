"""Modules and losses that hold state, and the geometry of crops: what a training script composes."""

from fastssl.nn.crop_overlap import overlap_grids
from fastssl.nn.self_relation_head import SelfRelationHead

__all__ = ["SelfRelationHead", "overlap_grids"]
