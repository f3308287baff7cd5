"""The choice of the build backend: by what is installed and requested, and the errors where it is impossible."""

from __future__ import annotations

import importlib.util

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines import backend
from qvlm_export.engines.backend import BACKENDS, INT4_TARGETS, RTX_TARGETS, choose_backend

REAL_FIND_SPEC = importlib.util.find_spec


@pytest.fixture
def machine(monkeypatch):
    """A function machine(*modules, gpu) that makes only these TensorRT modules, and a GPU or none, appear to be there."""

    def pretend(*modules, gpu=False):
        def find_spec(name, *rest):
            if name in ("tensorrt", "tensorrt_rtx"):
                return REAL_FIND_SPEC("json") if name in modules else None
            return REAL_FIND_SPEC(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(backend, "gpu_present", lambda: gpu)

    return pretend


def refusal_of(requested, targets=()):
    """Chooses a backend, which must fail with one line; returns it."""
    with pytest.raises(UserError) as caught:
        choose_backend(requested, targets)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("requested", ["cuda", "", "TensorRT", "rtx"])
def test_an_unknown_backend_is_refused_with_the_choices(requested):
    message = refusal_of(requested)
    assert message.startswith(f"--backend {requested}: unknown; choose one of ")
    assert all(name in message for name in BACKENDS)


@pytest.mark.parametrize("targets", [("sm88",), ("sm89", "sm88"), ("rtx",)])
def test_an_unknown_target_is_refused_with_the_choices(machine, targets):
    machine("tensorrt_rtx")
    message = refusal_of("tensorrt-rtx", targets)
    assert message.startswith(f"--target {targets[-1]}: unknown; TensorRT-RTX offers ")
    assert all(name in message for name in RTX_TARGETS)


def test_onnx_builds_nothing_and_takes_no_target(machine):
    machine()
    chosen = choose_backend("onnx", ())
    assert (chosen.name, chosen.module, chosen.version, chosen.targets) == ("onnx", None, None, ())
    assert refusal_of("onnx", ("sm89",)) == "--target sm89: the onnx backend builds no engine; leave --target out"


def test_without_tensorrt_auto_names_what_to_install(machine):
    machine()
    message = refusal_of("auto")
    assert message.startswith("no TensorRT is installed; run: pip install 'tensorrt-rtx")
    assert "--backend onnx" in message


@pytest.mark.parametrize(("requested", "package"), [("tensorrt-rtx", "'tensorrt-rtx<1.8,>=1.7'"), ("tensorrt", "tensorrt")])
def test_a_backend_that_is_not_installed_names_packages_that_pip_finds(machine, requested, package):
    machine()
    message = refusal_of(requested)
    assert message.startswith(f"--backend {requested}: not installed; run: pip install ")
    assert package in message
    assert "qvlm-export[" not in message


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("sm90", "TensorRT-RTX does not build for H100 and H200; export with --backend tensorrt on that machine"),
        ("SM_90", "H100 and H200"),
        ("9.0", "H100 and H200"),
        ("h100", "does not build for H100"),
        ("B200", "does not build for B200"),
        ("sm55", "unknown"),
        ("rtx4090", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_target_that_it_does_not_build_for_is_refused_with_the_list(machine, target, words):
    machine("tensorrt_rtx")
    message = refusal_of("tensorrt-rtx", (target,))
    assert message.startswith(f"--target {target}: ")
    assert words in message
    assert "TensorRT-RTX offers sm75, sm80" in message


@pytest.mark.parametrize("target", ["sm89", "SM89", "8.9", "89", "sm_89"])
def test_a_target_may_be_written_in_several_ways(machine, target):
    machine("tensorrt_rtx")
    assert choose_backend("tensorrt-rtx", (target,)).targets == ("sm89",)


@pytest.mark.parametrize(
    ("modules", "gpu", "name"),
    [
        (("tensorrt_rtx",), False, "tensorrt-rtx"),
        (("tensorrt_rtx",), True, "tensorrt-rtx"),
        (("tensorrt", "tensorrt_rtx"), False, "tensorrt-rtx"),
        (("tensorrt", "tensorrt_rtx"), True, "tensorrt"),
        (("tensorrt",), True, "tensorrt"),
    ],
)
def test_auto_chooses_the_full_tensorrt_only_with_a_gpu(machine, modules, gpu, name):
    machine(*modules, gpu=gpu)
    chosen = choose_backend("auto", ())
    assert chosen.name == name
    assert chosen.module == name.replace("-", "_")


def test_the_full_tensorrt_without_a_gpu_is_refused(machine):
    machine("tensorrt")
    assert "--backend tensorrt: needs an NVIDIA GPU" in refusal_of("tensorrt")
    assert "no TensorRT is installed" in refusal_of("auto")


def test_the_full_tensorrt_takes_no_target(machine):
    machine("tensorrt", "tensorrt_rtx", gpu=True)
    for requested in ("tensorrt", "auto"):
        assert refusal_of(requested, ("sm89",)).startswith("--target: TensorRT builds for the GPU of this machine")
    assert choose_backend("tensorrt", ()).targets == ()


def test_the_default_targets_are_all_that_support_int4(machine):
    machine("tensorrt_rtx")
    assert choose_backend("tensorrt-rtx", ()).targets == INT4_TARGETS
    assert set(INT4_TARGETS) == set(RTX_TARGETS) - {"sm75", "current"}


def test_targets_keep_their_order_without_duplicates(machine):
    machine("tensorrt_rtx")
    assert choose_backend("tensorrt-rtx", ("sm120", "sm80", "sm120")).targets == ("sm120", "sm80")


def test_the_installed_tensorrt_rtx_has_a_version_and_every_target():
    import tensorrt_rtx

    chosen = choose_backend("tensorrt-rtx", ())
    assert chosen.version.split(".")[:2] == ["1", "7"]
    assert all(hasattr(tensorrt_rtx.ComputeCapability, target.upper()) for target in RTX_TARGETS)


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert backend.gpu_present() is False
