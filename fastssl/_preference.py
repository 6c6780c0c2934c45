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
        "cpu": (
            Choice("cpp", "1.2 times as fast as SDPA with all tokens kept, 11 times with a quarter: benches/results"),
        ),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "packed_attention": {
        "cpu": (Choice("cpp", "1.3 times as fast as one SDPA per length, 197 and 37 tokens: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "sample_tokens": {
        "cpu": (Choice("cpp", "6.5 times as fast as eager forward, 9.6 with backward: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "self_relation": {
        "cpu": (
            Choice(
                "cpp",
                "2.2 times as fast as eager, forward and with backward (3.3 and 3.0 on a newer CPU): benches/results",
            ),
        ),
        "cuda": (
            Choice("triton", "unverified: no GPU has run it yet"),
            Choice("cpp", "unverified: no GPU has run it yet; forward only"),
        ),
    },
    "self_relation_loss": {
        "cpu": (Choice("cpp", "3.4 times as fast as eager with backward, 2.2 for channels: benches/results"),),
        "cuda": (Choice("triton", "unverified: no GPU has run it yet"),),
    },
    "simpool": {
        "cpu": (Choice("cpp", "16 times as fast as eager with backward, 12 with gamma = 1.25: benches/results"),),
        "cuda": (
            Choice("triton", "unverified: no GPU has run it yet"),
            Choice("cpp", "unverified: no GPU has run it yet"),
        ),
    },
}
