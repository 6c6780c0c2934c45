"""The order in which backends are tried, per op and device, each row with the measurement behind it."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """One row: a backend and what speaks for its place."""

    backend: str
    evidence: str


PREFERENCE: dict[str, dict[str, tuple[Choice, ...]]] = {
    "gram_loss": {
        "cpu": (Choice("cpp", "1.9 times as fast as eager forward, 2.2 with backward: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "masked_attention": {
        "cpu": (Choice("cpp", "1.3 to 8 times as fast as SDPA with a mask, all to a quarter of 197 tokens kept"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "packed_attention": {
        "cpu": (Choice("cpp", "1.4 times as fast as one SDPA per length, 197 and 37 tokens"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "sample_tokens": {
        "cpu": (Choice("cpp", "6.6 times as fast as eager forward, 7.8 with backward: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "self_relation": {
        "cpu": (
            Choice(
                "cpp",
                "2.3 times as fast as eager, forward and with backward (3.3 and 3.0 on a newer CPU): benches/results",
            ),
        ),
        "cuda": (
            Choice("triton", "unverified: no GPU has run it yet"),
            Choice("cpp", "unverified: no GPU has run it yet; forward only"),
        ),
    },
    "self_relation_loss": {
        "cpu": (Choice("cpp", "3.5 times as fast as eager with backward, 2.2 for channels: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "simpool": {
        "cpu": (Choice("cpp", "17 times as fast as eager with backward, 11 with gamma = 1.25: benches/results"),),
        "cuda": (
            Choice("triton", "unverified: no GPU has run it yet"),
            Choice("cpp", "unverified: no GPU has run it yet"),
        ),
    },
}
