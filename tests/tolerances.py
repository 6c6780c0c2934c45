"""The tolerances of all tests, as relative norms ‖out − ref‖ / ‖ref‖ against float64, with the worst case measured.

Half-precision rows are for results whose own rounding to that dtype is the error (2^-9 for bfloat16, 2^-12 for
float16, half a unit in the last place, as a norm).
"""

import torch

#: Forward. Measured on the CPU (avx512, avx2, portable): float32 4.2e-7, float64 1.0e-15, bfloat16 2.5e-3,
#: float16 3.1e-4.
FORWARD = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}

#: First derivatives. Measured: float32 3.4e-6, float64 1.3e-13, bfloat16 3.0e-3, float16 6.0e-3 (float16 gradients
#: of some 1e-6 are subnormal numbers).
GRADIENT = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def of_logits(largest):
    """What float32 leaves of exp(S): a logit of this size is itself known to a unit in its last place, 2^-23 of it.

    A loss of rows that are nearly one-hot is such an exponential. Measured: up to 0.6 of this (portable, without fused
    multiply-adds, at 134); of an attention's logits of 1e4, 0.02 forward and 0.25 of its gradients.
    """
    return max(FORWARD[torch.float32], largest * 2.0**-23)
