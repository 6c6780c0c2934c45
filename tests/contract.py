"""What the contract tests of the losses share: calls on any number of threads, refusals, and the losses themselves."""

from typing import Any, NamedTuple

import pytest
import torch
from compare import gradients

import fastssl
from fastssl import _library

needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")


def make(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def tensors(batch, length, width, columns=None, *, dtype=torch.float32):
    """Student and teacher of `length` tokens, and as many columns of each where asked."""
    sides = {"": length} if columns is None else {"": length, "_columns": columns}
    made = {f"student{name}": make(batch, number, width, dtype=dtype) for name, number in sides.items()}
    for name, number in sides.items():
        made[f"teacher{name}"] = make(batch, number, width, dtype=dtype, grad=False)
    return made


def leaves(given):
    return [t for t in given.values() if t.requires_grad]


def on_threads(run, numbers=(1, 2, 3, 1)):
    """What `run` returns on each number of threads."""
    before, results = torch.get_num_threads(), []
    for threads in numbers:
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(before)
    return results


def assert_same_bits_on_any_number_of_threads(run):
    """run: some tensors."""
    first, *others = on_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def assert_refused(op, given, error, message):
    """One sentence, of the op and of fastssl.explain."""
    with pytest.raises(error, match=message) as caught:
        getattr(fastssl, op)(**given)
    assert str(caught.value).startswith(f"{op}: ")
    assert "\n" not in str(caught.value)
    if "backend" not in given:
        with pytest.raises(error, match=message):
            fastssl.explain(op, **given)


class Loss(NamedTuple):
    """One way to call one of the losses."""

    op: str
    options: dict[str, Any]
    columns: bool = False

    def __call__(self, given, backend="cpp"):
        return getattr(fastssl, self.op)(**given, **self.options, backend=backend)

    def given(self, batch, length=9, width=8):
        """Its tensors, those of the student with gradients."""
        return tensors(batch, length, width, length + 2 if self.columns else None)

    def gradients(self, given, upstream=1.0):
        loss = self(given)
        return gradients(loss, leaves(given), torch.full_like(loss, upstream))


RELATION, GRAM = Loss("self_relation_loss", {"num_heads": 2, "teacher_temp": 0.7}), Loss("gram_loss", {})
#: Means, whose gradient may come with the loss.
MEANS = {
    "relation": RELATION,
    "relation, columns": RELATION._replace(columns=True),
    "gram": GRAM,
    "gram, batch": Loss("gram_loss", {"per_image": False, "remove_negatives": "both"}),
}
_ROWS = RELATION._replace(options={**RELATION.options, "reduction": "none"})
ALL = MEANS | {"relation, rows": _ROWS, "relation, rows, columns": _ROWS._replace(columns=True)}


def losses(which=ALL):
    return pytest.mark.parametrize("loss", which.values(), ids=which)


#: Enough heads and images for one pass, or not.
BATCH = pytest.mark.parametrize("batch", [2, 9], ids=["two-pass", "one-pass"])
