"""Comparing with a float64 reference as vectors: one number for a whole tensor."""

import torch


def relative_error(got, truth):
    """‖got − truth‖ / ‖truth‖ in float64; for a truth of (almost) nothing, the mean size of what was got instead."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    error, size = (got - truth).norm().item(), truth.norm().item()
    if got.numel() == 0:
        return 0.0
    return error / size if size > 1e-9 * truth.numel() ** 0.5 else error / truth.numel() ** 0.5


def assert_close(got, truth, tolerance, what=""):
    error = relative_error(got, truth)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def doubles(tensors):
    """The same values in float64 on the CPU, as new leaves; None stays None."""
    return [None if t is None else t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors]


def gradients(out, inputs, upstream):
    """First derivatives of out·upstream to the inputs that want one."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(out, wanted, upstream)
