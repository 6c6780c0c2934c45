"""What a side runs when it is timed, and the comparison with float64 that comes before any timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from harness import Case

#: Largest relative error ‖out − truth‖ / ‖truth‖ of a side against float64, per dtype of the inputs. It tells
#: another function from rounding; how much a kernel may add to plain PyTorch's rounding is for the tests.
#: Worst eager error of self_relation's cases on a CPU: 1e-6, 1.3e-3 and 1e-2 (the gradients).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Mismatch(AssertionError):
    """A side does not compute what the float64 run computes."""


class Step(NamedTuple):
    """One timed call. `prepare` runs outside the clock, `run` inside it; its tensors are compared."""

    prepare: Callable[[], Any]
    run: Callable[[Any], tuple[Tensor, ...]]


def make_step(
    run: Callable[..., Tensor],
    mode: str,
    inputs: tuple[Tensor, ...],
    differentiable: tuple[int, ...],
    upstream: Tensor | None,
) -> Step:
    """`forward` records no gradients, as in a teacher; `backward` has its forward in `prepare`."""
    if mode == "forward":
        plain = tuple(x.detach() for x in inputs)
        return Step(lambda: None, lambda _: (run(*plain),))
    leaves = tuple(x.detach().requires_grad_(i in differentiable) for i, x in enumerate(inputs))
    wanted = tuple(leaves[i] for i in differentiable)
    if mode == "backward":
        return Step(lambda: run(*leaves), lambda out: torch.autograd.grad(out, wanted, upstream))

    def both(_: Any) -> tuple[Tensor, ...]:
        out = run(*leaves)
        return (out, *torch.autograd.grad(out, wanted, upstream))

    return Step(lambda: None, both)


def check(case: Case, mode: str, seed: int) -> tuple[dict[str, Step], dict[str, list[float]]]:
    """The steps to time and their errors against float64 on fresh random inputs; raises Mismatch."""
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(to_case(x, case) for x in case.make_inputs(generator))
    before = tuple(x.clone() for x in inputs)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    truth_run = case.truth or case.sides[0].run
    upstream = None
    if mode != "forward":
        # The gradient that comes in is random and fixed before the clock starts; a scalar loss needs none.
        shape = truth_run(*exact).shape
        if shape:
            upstream = torch.randn(shape, generator=generator).to(case.device, case.dtype)
    truth_step = make_step(truth_run, mode, exact, case.differentiable, None if upstream is None else upstream.double())
    truth = tuple(t.detach() for t in truth_step.run(truth_step.prepare()))
    tolerance = TOLERANCE[case.dtype] if case.tolerance is None else case.tolerance
    steps, errors, wrong = {}, {}, []
    for side in case.present(mode):
        step = make_step(side.run, mode, inputs, case.differentiable, upstream)
        state = step.prepare()
        _poison(truth, case.dtype)
        results = step.run(state)
        errors[side.name] = [relative_error(r.detach(), t) for r, t in zip(results, truth, strict=True)]
        # `not e <= tolerance`, because a NaN must not pass
        if any(not e <= tolerance for e in errors[side.name]):
            wrong.append(f"{side.name} is off by {', '.join(f'{e:.2g}' for e in errors[side.name])}")
        steps[side.name] = step
        del state, results
        if not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)):
            wrong.append(f"{side.name} wrote to an input")
            break  # what comes after would be compared on other inputs
    if wrong:
        raise Mismatch(
            f"{case.op} {case.shape} {name(case.dtype)} {mode} is not timed: {'; '.join(wrong)} "
            f"(relative to float64, allowed {tolerance:.2g}, seed {seed})"
        )
    return steps, errors


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in float64; infinite for another shape or anything not finite."""
    if result.shape != truth.shape or not bool(result.isfinite().all()):
        return float("inf")
    scale = float(truth.norm())
    return float((result.double() - truth).norm()) / (scale if scale > 0 else 1.0)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_case(x: Tensor, case: Case) -> Tensor:
    """An input on the case's device and, unless it holds integers or a mask, in its dtype."""
    return x.to(case.device, case.dtype) if x.is_floating_point() else x.to(case.device)


def _poison(like: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Leaves NaN in the freed memory that outputs are likely to get, so that an unwritten element shows."""
    blocks = [torch.full(t.shape, float("nan"), dtype=dtype, device=t.device) for t in like for _ in range(2)]
    del blocks
