"""Selection: what each backend must accept and must refuse, forcing, explaining, falling back, and the CLI's info."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastssl
from fastssl import _backends, _library, kernels
from fastssl._backends import OPS, Call, reasons_against
from fastssl._preference import PREFERENCE

needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")


def call(device="cpu", dtype=torch.float32, other=None, grad=False, rows=196, columns=196, depth=64):
    dtypes = (("x", dtype),) + ((("columns", other),) if other is not None else ())
    return Call("self_relation", device, dtypes, grad, {"rows": rows, "columns": columns, "depth": depth})


def pretend(built, monkeypatch):
    """A machine where everything is installed or, with built=False, nothing."""
    why = None if built else "not built here"
    monkeypatch.setattr(_library, "why_not", why)
    monkeypatch.setattr(_library, "why_no_cuda", why)
    monkeypatch.setattr(kernels, "_installed", built)


def refusals(backend, monkeypatch, built=True, **facts):
    pretend(built, monkeypatch)
    return reasons_against(OPS["self_relation"].backend(backend), call(**facts))


MUST_ACCEPT = [
    ("reference", dict()),
    ("reference", dict(device="mps", dtype=torch.float16, grad=True)),
    ("cpp", dict()),
    ("cpp", dict(grad=True)),
    ("cpp", dict(dtype=torch.float64, grad=True)),
    ("cpp", dict(dtype=torch.bfloat16, other=torch.float32, grad=True)),
    ("cpp", dict(rows=5000, columns=7000, depth=768)),
    ("cpp", dict(device="cuda")),
    ("cpp", dict(device="cuda", dtype=torch.bfloat16, other=torch.float16)),
    ("triton", dict(device="cuda")),
    ("triton", dict(device="cuda", grad=True, dtype=torch.bfloat16)),
    ("triton", dict(device="cuda", rows=5000, columns=7000, depth=768)),
]
MUST_REFUSE = [
    ("cpp", dict(device="mps"), "takes tensors on cpu or cuda, got mps"),
    ("cpp", dict(device="cuda", grad=True), "its CUDA kernel has no backward"),
    ("cpp", dict(device="cuda", dtype=torch.float64), "takes no float64 x"),
    ("cpp", dict(device="cuda", columns=5000), "bytes are more than 101376"),
    ("cpp", dict(built=False), "not built here"),
    ("triton", dict(device="cuda", dtype=torch.float64), "takes x of dtype float32, bfloat16, float16, got float64"),
    ("triton", dict(device="mps"), "takes tensors on cuda or cpu, got mps"),
    ("triton", dict(device="cuda", built=False), "triton is not installed"),
]


LOSS_SIZES = {"rows": 196, "columns": 196, "depth": 64}
SAMPLING_SIZES = {"tokens": 196, "points": 169, "channels": 384}
#: The other ops: (op, backend, device, dtypes of the arguments, needs a gradient), and why not.
OTHERS_MUST_ACCEPT = [
    (op, backend, device, dtype, grad)
    for op in ("self_relation_loss", "sample_tokens")
    for backend, device, dtypes in (
        ("cpp", "cpu", _backends.FLOATING),
        ("triton", "cuda", _backends.HALF_AND_SINGLE),
        ("reference", "mps", _backends.FLOATING),
    )
    for dtype in dtypes
    for grad in (False, True)
]
OTHERS_MUST_REFUSE = [
    (op, *case)
    for op in ("self_relation_loss", "sample_tokens")
    for case in (
        ("cpp", "mps", torch.float32, True, "takes tensors on cpu, got mps"),
        ("cpp", "cuda", torch.float32, True, "takes tensors on cpu, got cuda"),
        ("cpp", "cpu", torch.float32, False, "not built here"),
        ("triton", "cuda", torch.float64, True, "of dtype float32, bfloat16, float16, got float64"),
        ("triton", "mps", torch.float32, True, "takes tensors on cuda or cpu, got mps"),
        ("triton", "cuda", torch.float32, False, "triton is not installed"),
    )
]
POOLING_SIZES = {"tokens": 196, "channels": 384, "heads": 6}
OTHERS_MUST_ACCEPT += [
    ("simpool", backend, device, dtype, grad)
    for backend, device, dtypes in (
        ("cpp", "cpu", _backends.FLOATING),
        ("cpp", "cuda", _backends.HALF_AND_SINGLE),
        ("triton", "cuda", _backends.HALF_AND_SINGLE),
        ("reference", "mps", _backends.FLOATING),
    )
    for dtype in dtypes
    for grad in (False, True)
]
OTHERS_MUST_REFUSE += [
    ("simpool", "cpp", "mps", torch.float32, True, "takes tensors on cpu or cuda, got mps"),
    ("simpool", "cpp", "cuda", torch.float64, True, "its CUDA kernels take no float64 x"),
    ("simpool", "cpp", "cuda", torch.float64, True, "its CUDA kernels take no float64 norm_bias"),
    ("simpool", "cpp", "cpu", torch.float32, False, "not built here"),
    ("simpool", "cpp", "cuda", torch.float32, False, "not built here"),
    ("simpool", "triton", "cuda", torch.float64, True, "takes x of dtype float32, bfloat16, float16, got float64"),
    ("simpool", "triton", "cuda", torch.float64, True, "takes wk of dtype float32, bfloat16, float16, got float64"),
    ("simpool", "triton", "mps", torch.float32, True, "takes tensors on cuda or cpu, got mps"),
    ("simpool", "triton", "cuda", torch.float32, False, "triton is not installed"),
]


def other_reasons(op, backend, device, dtype, grad, built, monkeypatch):
    pretend(built, monkeypatch)
    names, sizes = {
        "self_relation_loss": (("student", "teacher"), LOSS_SIZES),
        "sample_tokens": (("x", "grid"), SAMPLING_SIZES),
        "simpool": (("x", "wq", "wk", "norm_weight", "norm_bias", "beta"), POOLING_SIZES),
    }[op]
    made = Call(op, device, tuple((name, dtype) for name in names), grad, sizes)
    return reasons_against(OPS[op].backend(backend), made)


ATTENTIONS = ("masked_attention", "packed_attention")
#: (backend, facts), and why not. The facts are those of `attention_reasons`.
ATTENTION_MUST_ACCEPT = [
    *(("cpp", dict(dtypes=(dtype,) * 3, depth=33)) for dtype in _backends.FLOATING),
    *(("triton", dict(device="cuda", dtypes=(dtype,) * 3)) for dtype in _backends.HALF_AND_SINGLE),
    *(("triton", dict(device="cuda", depth=depth)) for depth in (16, 24, 40, 64, 72, 96, 128)),
    ("cpp", dict(depth=1)),
    ("cpp", dict(depth=1024, tokens=100_000, grad=False)),
    ("cpp", dict(tokens=0)),
    ("triton", dict(device="cuda", tokens=0, grad=False)),
    ("triton", dict(device="cuda", tokens=100_000)),
    ("reference", dict(device="mps", dtypes=(torch.float16, torch.float32, torch.float64), depth=33)),
]
ATTENTION_MUST_REFUSE = [
    ("cpp", dict(device="cuda"), "takes tensors on cpu, got cuda"),
    ("cpp", dict(device="mps"), "takes tensors on cpu, got mps"),
    ("cpp", dict(device="meta"), "takes tensors on cpu, got meta"),
    ("cpp", dict(built=False), "not built here"),
    (
        "cpp",
        dict(dtypes=(torch.float32, torch.float32, torch.float64)),
        "takes q, k and v of one dtype, got float32, float32, float64",
    ),
    (
        "triton",
        dict(device="cuda", dtypes=(torch.bfloat16, torch.float16, torch.float16)),
        "takes q, k and v of one dtype, got bfloat16, float16, float16",
    ),
    *(
        ("triton", dict(device="cuda", depth=depth), f"widths from 16 to 128 that are multiples of 8, got {depth}")
        for depth in (8, 33, 100, 136)
    ),
    (
        "triton",
        dict(device="cuda", dtypes=(torch.float64,) * 3),
        "takes v of dtype float32, bfloat16, float16, got float64",
    ),
    ("triton", dict(device="mps"), "takes tensors on cuda or cpu, got mps"),
    ("triton", dict(device="cuda", built=False), "triton is not installed"),
]


def attention_reasons(
    op, backend, monkeypatch, device="cpu", dtypes=(torch.float32,) * 3, grad=True, depth=64, tokens=197, built=True
):
    pretend(built, monkeypatch)
    made = Call(op, device, tuple(zip("qkv", dtypes, strict=True)), grad, {"tokens": tokens, "depth": depth})
    return reasons_against(OPS[op].backend(backend), made)


@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize(("backend", "facts"), ATTENTION_MUST_ACCEPT)
def test_attentions_must_accept(op, backend, facts, monkeypatch):
    assert attention_reasons(op, backend, monkeypatch, **facts) == []


@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize(("backend", "facts", "reason"), ATTENTION_MUST_REFUSE)
def test_attentions_must_refuse(op, backend, facts, reason, monkeypatch):
    assert reason in "; ".join(attention_reasons(op, backend, monkeypatch, **facts))


@pytest.mark.parametrize(("op", "backend", "device", "dtype", "grad"), OTHERS_MUST_ACCEPT)
def test_other_ops_must_accept(op, backend, device, dtype, grad, monkeypatch):
    assert other_reasons(op, backend, device, dtype, grad, True, monkeypatch) == []


@pytest.mark.parametrize(("op", "backend", "device", "dtype", "built", "reason"), OTHERS_MUST_REFUSE)
def test_other_ops_must_refuse(op, backend, device, dtype, built, reason, monkeypatch):
    assert reason in "; ".join(other_reasons(op, backend, device, dtype, True, built, monkeypatch))


@pytest.mark.parametrize(("backend", "facts"), MUST_ACCEPT)
def test_must_accept(backend, facts, monkeypatch):
    assert refusals(backend, monkeypatch, **facts) == []


@pytest.mark.parametrize(("backend", "facts", "reason"), MUST_REFUSE)
def test_must_refuse(backend, facts, reason, monkeypatch):
    assert reason in "; ".join(refusals(backend, monkeypatch, **facts))


def test_all_reasons_are_given(monkeypatch):
    reasons = refusals("cpp", monkeypatch, device="cuda", dtype=torch.float64, grad=True, columns=5000)
    assert len(reasons) == 3
    message = None
    with pytest.raises(ValueError, match="backend 'cpp' cannot take this call: ") as caught:
        _backends.select(call("cuda", torch.float64, None, True, columns=5000), "cpp")
    message = str(caught.value)
    assert all(reason in message for reason in reasons)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "_installed", True)
    triton = OPS["self_relation"].backend("triton")
    monkeypatch.setattr(kernels, "interpreted", False)
    assert "TRITON_INTERPRET=1" in reasons_against(triton, call())[0]
    monkeypatch.setattr(kernels, "interpreted", True)
    assert reasons_against(triton, call()) == []


def test_every_op_has_a_reference_a_preference_and_evidence():
    for name, op in OPS.items():
        assert op.backend("reference")
        for choices in PREFERENCE[name].values():
            for choice in choices:
                assert op.backend(choice.backend).name != "reference"
                assert len(choice.evidence) > 10


@needs_library
def test_the_fast_backend_is_chosen_and_used(monkeypatch):
    x = torch.randn(2, 5, 6)
    assert fastssl.explain("self_relation", x).chosen == "cpp"
    with torch.profiler.profile() as profile:
        fastssl.self_relation(x)
    assert "fastssl::self_relation_forward" in {event.key for event in profile.key_averages()}


def test_use_backend_forces_and_restores():
    x = torch.randn(2, 5, 6)
    before = fastssl.explain("self_relation", x).chosen
    with fastssl.use_backend("reference"):
        assert fastssl.explain("self_relation", x).chosen == "reference"
        with fastssl.use_backend(None):
            assert fastssl.explain("self_relation", x).chosen == before
        assert fastssl.explain("self_relation", x).chosen == "reference"
    assert fastssl.explain("self_relation", x).chosen == before
    with (
        pytest.raises(ValueError, match=r"use_backend: backend must be one of .* got 'fast'"),
        fastssl.use_backend("fast"),
    ):
        pass


def test_a_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_library, "why_not", "not built here")
    x = torch.randn(2, 5, 6)
    with fastssl.use_backend("cpp"), pytest.raises(ValueError, match="'cpp' cannot take this call: not built here"):
        fastssl.self_relation(x)
    with pytest.raises(ValueError, match="self_relation: backend must be one of 'cpp', 'triton', 'reference', got 'x'"):
        fastssl.self_relation(x, backend="x")


def test_explain_says_who_and_why():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    explanation = fastssl.explain("self_relation", x, num_heads=2)
    text = str(explanation)
    assert explanation.reasons["reference"] == []
    assert any("float64" in reason for reason in explanation.reasons["triton"])
    assert f"-> {explanation.chosen}" in text
    assert "triton     no: " in text
    assert fastssl.explain("self_relation", x, backend="triton").chosen is None
    with pytest.raises(ValueError, match=r"explain: op must be one of .*'self_relation'.* got 'softmax'"):
        fastssl.explain("softmax", x)


def test_falling_back_warns_once(monkeypatch):
    monkeypatch.setattr(_library, "why_not", "not built here")
    monkeypatch.setattr(_backends, "_warned", set())
    x = torch.randn(2, 5, 6)
    with pytest.warns(UserWarning, match=r"no fast backend takes this call.*cpp: not built here"):
        fastssl.self_relation(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastssl.self_relation(x)


def test_falling_back_warns_under_torch_compile_too(monkeypatch):
    monkeypatch.setattr(_library, "why_not", "not built for compilation")
    monkeypatch.setattr(_backends, "_warned", set())
    compiled = torch.compile(lambda x: fastssl.self_relation(x), fullgraph=True, backend="eager")
    x = torch.randn(2, 5, 6)
    with pytest.warns(UserWarning, match=r"no fast backend takes this call.*cpp: not built for compilation"):
        out = compiled(x)
    torch.testing.assert_close(out, fastssl.self_relation(x, backend="reference"))


def test_strict_makes_falling_back_an_error(monkeypatch):
    monkeypatch.setattr(_library, "why_not", "not built here")
    monkeypatch.setattr(_backends, "STRICT", True)
    with pytest.raises(RuntimeError, match="FASTSSL_STRICT=1"):
        fastssl.self_relation(torch.randn(2, 5, 6))


# ---- in a process of its own -----------------------------------------------------------------------------------


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSSL_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, cwd="/", timeout=120
    )


def test_environment_forces_a_backend():
    done = run(
        "import fastssl, torch; print(fastssl.explain('self_relation', torch.ones(1, 2, 2)).chosen)",
        FASTSSL_BACKEND="reference",
    )
    assert done.stdout.strip() == "reference"
    done = run("import fastssl", FASTSSL_BACKEND="magic")
    assert "FASTSSL_BACKEND: backend must be one of" in done.stderr


@needs_library
def test_environment_chooses_a_cpu_path():
    show = "import fastssl; print(fastssl._library.module.cpu_path())"
    assert run(show, FASTSSL_CPU_PATH="portable").stdout.strip() == "portable"
    assert "FASTSSL_CPU_PATH: must be one of portable" in run(show, FASTSSL_CPU_PATH="neon9").stderr


def test_import_is_light_quiet_and_touches_no_device():
    """13 ms beyond `import torch`, measured; what could make it seconds is an import of these."""
    done = run(
        "import torch, sys; before = set(sys.modules); import fastssl\n"
        "heavy = {'torch._dynamo', 'triton', 'numpy', 'sympy', 'matplotlib'} & (set(sys.modules) - before)\n"
        "print(sorted(heavy), torch.cuda.is_initialized())"
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[] False"


def test_a_library_that_fails_to_load_is_shown_not_hidden():
    broken = (
        "import importlib.util, importlib.machinery, sys\n"
        "real = importlib.util.find_spec\n"
        "class Broken(importlib.machinery.SourceFileLoader):\n"
        "    def exec_module(self, module): raise ImportError('undefined symbol: _ZN2at')\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fastssl._C':\n"
        "            return importlib.util.spec_from_loader(name, Broken(name, '/nowhere'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import torch, fastssl\n"
        "from fastssl.cli import main\n"
        "main(['info'])\n"
        "print(fastssl.explain('self_relation', torch.ones(1, 2, 2)))\n"
    )
    done = run(broken)
    assert done.returncode == 0, done.stderr
    assert "failed to load (ImportError: undefined symbol: _ZN2at)" in done.stdout
    assert "Traceback" in done.stdout
    assert "-> reference" in done.stdout


def test_info_lists_every_backend():
    done = subprocess.run([sys.executable, "-m", "fastssl", "info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for expected in ("fastssl  0.1.0", "torch    ", "self_relation on cpu", "self_relation on cuda", "reference"):
        assert expected in done.stdout
    assert done.stdout.count("triton     ") >= 2
