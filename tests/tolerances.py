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


#: Losses and gradients of one pass against those of two on the CPU, both float32. Measured (avx512, avx2, portable):
#: gram_loss 2.8e-7, self_relation_loss 2.6e-7.
ONE_PASS = 1e-6

#: Gradients of one Triton launch against those of two. Measured: float32 1.8e-7, float16 4.0e-4.
ONE_LAUNCH = {torch.float32: 2e-6, torch.float16: 4e-3}

#: gram_loss of matrices of similarities near one that differ by so much: S − T has what float32 leaves of it, 6e-8.
#: Measured: 7.0e-6 and 3.0e-4; the formula in float32 has up to 1.0e-3 of the latter.
DIFFERENCES = {1e-4: 1e-4, 1e-6: 2e-3}

#: Gradients of rows that are nearly one-hot off the diagonal: four logits of 159 to 165 make an element of dS, each
#: known to a unit in its last place, 2e-5. Measured: 7.7e-5.
OFF_THE_DIAGONAL = 8e-5

#: Gradients where logits are some 1e4: float32 keeps these to ±1e-3, which becomes the relative error of each share of
#: what is not saturated. Measured: 4.2e-5.
LARGE_LOGITS = 1e-3

#: Samples of a map so large that float32 would be off by 4e-6 of a token. Measured: 4.8e-8.
LARGE_MAPS = 2e-7

#: simpool, a chain of a mean, two projections, a softmax and powers. Forward: measured on the CPU (avx512, avx2,
#: portable) float32 7.0e-7, float64 2.0e-15, bfloat16 2.3e-3, float16 2.4e-4. First derivatives to each argument:
#: float32 6.2e-6, float64 2.0e-14, bfloat16 2.9e-3, float16 3.9e-4.
POOLED = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}
POOLED_GRADIENT = {torch.float32: 5e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 1e-2}
