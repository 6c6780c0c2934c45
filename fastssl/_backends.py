"""Which backend runs a call: declared facts, one predicate that gives all reasons, and the choice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastssl._preference import PREFERENCE

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: What Triton kernels take: float64 would need other tiles.
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What a backend may know of a call before it runs: metadata, never values."""

    op: str
    device: str
    dtypes: tuple[tuple[str, torch.dtype], ...]  # (argument, dtype)
    needs_grad: bool
    sizes: dict[str, int]  # named by the op


@dataclass(frozen=True)
class Backend:
    """The declared facts of one op on one backend."""

    name: str
    devices: tuple[str, ...]  # empty: any
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[str], str | None]  # device -> why this backend cannot be used at all
    limits: Callable[[Call], list[str]] = lambda call: []  # what the op's kernel adds: sizes, gradients


@dataclass(frozen=True)
class Op:
    """One entry of the registry. `describe` takes the public call's arguments and gives a Call, or raises."""

    name: str
    describe: Callable[..., Call]
    backends: tuple[Backend, ...]

    def backend(self, name: str) -> Backend:
        for b in self.backends:
            if b.name == name:
                return b
        names = ", ".join(repr(b.name) for b in self.backends)
        raise ValueError(f"{self.name}: backend must be one of {names}, got {name!r}")


OPS: dict[str, Op] = {}
NAMES = ("reference", "cpp", "triton")
_state: dict[str, str | None] = {"forced": None}
_warned: set[str] = set()
STRICT = os.environ.get("FASTSSL_STRICT", "0") not in ("", "0")


def register(op: Op) -> None:
    OPS[op.name] = op


def always(device: str) -> str | None:
    """`unavailable` of a backend that needs nothing."""
    return None


def reasons_against(backend: Backend, call: Call) -> list[str]:
    """All reasons why `backend` cannot take `call`; empty means that it can.

    Selection, the error of a forced backend, `explain` and the tests all ask this one function.
    """
    reasons = []
    if backend.devices and call.device not in backend.devices:
        reasons.append(f"takes tensors on {' or '.join(backend.devices)}, got {call.device}")
    else:
        missing = backend.unavailable(call.device)
        if missing is not None:
            reasons.append(missing)
    for argument, dtype in call.dtypes:
        if dtype not in backend.dtypes:
            reasons.append(f"takes {argument} of dtype {_names(backend.dtypes)}, got {_name(dtype)}")
    return reasons + backend.limits(call)


def select(call: Call, backend: str | None = None) -> str:
    """The name of the backend that runs `call`: the forced one, or the first of the preference that can."""
    op = OPS[call.op]
    wanted = backend if backend is not None else _state["forced"]
    if wanted is not None:
        reasons = reasons_against(op.backend(wanted), call)
        if reasons:
            raise ValueError(f"{call.op}: backend {wanted!r} cannot take this call: {'; '.join(reasons)}")
        return wanted
    name, refusals = _preferred(op, call)
    if name is None:
        because = "; ".join(refusals) or f"no fast backend for {call.device}"
        message = f"{call.op}: no fast backend takes this call, the slower reference runs instead ({because})"
        if STRICT:
            raise RuntimeError(message + "; FASTSSL_STRICT=1 makes this an error")
        _warn_once(f"{call.op} {call.device} {call.dtypes} {call.needs_grad}", message)
    return name or "reference"


def _preferred(op: Op, call: Call) -> tuple[str | None, list[str]]:
    """The first backend of the preference that takes the call, or None and what each of them said."""
    refusals = []
    for choice in PREFERENCE[call.op].get(call.device, ()):
        reasons = reasons_against(op.backend(choice.backend), call)
        if not reasons:
            return choice.backend, []
        refusals.append(f"{choice.backend}: {', '.join(reasons)}")
    return None, refusals


def _warn_once(kind: str, message: str) -> bool:
    """Warns the first time this kind of call comes; a constant for torch.compile, which then warns while it traces."""
    import warnings

    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, UserWarning, stacklevel=4)
    return True


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo, which takes a second.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_backend() -> str | None:
    """The backend that FASTSSL_BACKEND or use_backend forces, or None."""
    return _state["forced"]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every op inside the `with` block, in the whole process; None gives the choice back.

    The forced backend runs or raises a ValueError with all its reasons; nothing falls back.

    Args:
        name: "reference", "cpp", "triton", or None.
    """
    _check_name("use_backend", name)
    before = _state["forced"]
    _state["forced"] = name
    try:
        yield
    finally:
        _state["forced"] = before


class Explanation(NamedTuple):
    """What `explain` returns: the backend that would run, and every backend's reasons against the call."""

    op: str
    device: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen or 'refused'}"]
        for name, reasons in self.reasons.items():
            verdict = "; ".join(reasons) if reasons else "takes this call"
            mark = "->" if name == self.chosen else "  "
            lines.append(f"{mark} {name:<10} {'no: ' if reasons else ''}{verdict}")
        return "\n".join(lines)


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Says which backend would run a call and why the others would not, without running it.

    Args:
        op: the op's name, such as "self_relation".
        *args, **kwargs: the arguments of that call.
        backend: a forced backend, as in the call; a refusal is then shown instead of raised.

    Returns:
        An Explanation; print it.

    Raises:
        ValueError: `op` is not an op of this library, or the arguments are ones that the op itself refuses.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(map(repr, sorted(OPS)))}, got {op!r}")
    call = OPS[op].describe(*args, **kwargs)
    reasons = {b.name: reasons_against(b, call) for b in OPS[op].backends}
    wanted = backend if backend is not None else _state["forced"]
    if wanted is not None:
        OPS[op].backend(wanted)
        chosen = None if reasons[wanted] else wanted
    else:
        chosen = _preferred(OPS[op], call)[0] or (None if STRICT else "reference")
    return Explanation(op, call.device, chosen, reasons)


def _check_name(who: str, name: str | None) -> None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{who}: backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(d) for d in dtypes)


_environment = os.environ.get("FASTSSL_BACKEND") or None
_check_name("FASTSSL_BACKEND", _environment)
_state["forced"] = _environment
