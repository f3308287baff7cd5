"""ONNX Runtime with CUDA, decided without a GPU: CPU sessions over the float16 graphs stand in for those on a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import read_manifest
from qvlm_export.engines.runtime.onnx_runner import CPU, CUDA, HEAVY_OPS, Cuda, errors, find_ops_outside, open_runner
from qvlm_export.engines.runtime.open import Machine, open_session
from qvlm_export.engines.runtime.session import Session


@pytest.fixture(scope="module")
def manifest(llava, tmp_path_factory):
    """An export of float16 graphs with INT4 and INT8 products, without engines."""
    plan = tmp_path_factory.mktemp("cuda") / "x.plan"
    qvlm_export.export(str(llava()), plan, scheme="int4", backend="onnx", samples=2, max_length=64)
    return read_manifest(plan.with_suffix(".json"))


class Pretender:
    """A CPU session that says it were on a GPU, but for the types of nodes in `left`. `broken` makes every run fail."""

    def __init__(self, session, left=(), providers=(CUDA, CPU), broken=None):
        self._session, self._left, self._providers, self._broken = session, left, providers, broken

    def get_providers(self):
        return list(self._providers)

    def get_provider_graph_assignment_info(self):
        nodes = {CPU: ["Shape", *self._left], CUDA: ["MatMul", "Attention"]}
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda types=types: [SimpleNamespace(op_type=t) for t in types])
            for name, types in nodes.items()
        ]

    def run_with_iobinding(self, binding):
        if self._broken is not None:
            raise self._broken
        return self._session.run_with_iobinding(binding)

    def __getattr__(self, name):
        return getattr(self._session, name)


def pretended(created=None, fails=None, **traits):
    """Cuda as if on a machine with a GPU. created: what sessions were made of is appended; fails: raised instead."""

    def create(path, options, providers, enable_fallback):
        if created is not None:
            created.append((path, providers, enable_fallback))
        if fails is not None:
            raise fails
        return Pretender(ort.InferenceSession(path, options, providers=[CPU]), **traits)

    return Cuda(providers=lambda: [CUDA, CPU], gpu=lambda: True, create=create, memory="cpu")


def inputs(config):
    pixels = np.random.default_rng(0).standard_normal((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
    return np.array([[1, *[config.image_token_id] * config.vision.tokens_per_image, 7, 9, 11]]), pixels


def test_cuda_runs_the_float16_graphs_as_they_are_written(manifest):
    created = []
    runner, reason = open_runner(manifest, cuda=pretended(created))
    assert (runner.name, runner.device, reason) == ("onnxruntime", "cuda", "")
    graphs = [str(manifest.file(f"{part}_onnx")) for part in ("vision", "language")]
    assert created == [(graph, [CUDA, CPU], 0) for graph in graphs]  # no twin, and no silent way back
    twin, _ = open_runner(manifest, threads=1)
    ids, pixels = inputs(manifest.config)
    assert runner.embed_images(pixels).dtype == np.float16
    # A rounding of the tower's INT8 products that falls the other way is a whole step.
    for given, allowed in (((np.arange(5, 30)[None], None), 0.01), ((ids, pixels), 0.1)):
        found, wanted = (Session(manifest, r).logits(*given) for r in (runner, twin))
        assert found.dtype == np.float32
        assert 0 < np.linalg.norm(found - wanted) < allowed * np.linalg.norm(wanted)


def test_caches_of_the_float16_graphs_hold_what_was_fed(manifest):
    runner, _ = open_runner(manifest, cuda=pretended())
    cache = runner.new_cache(1)
    assert {value.numpy().dtype for value in cache} == {np.dtype(np.float16)}
    session = Session(manifest, runner)
    whole = session.logits(np.arange(5, 15)[None])[0]
    sequences = session.start([np.arange(5, 10)])
    session.extend(sequences, [np.arange(10, 15)])
    np.testing.assert_allclose(sequences.logits[0], whole[-1], atol=0.02 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ({"left": ["DequantizeLinear", "TensorScatter"]}, "no kernel for DequantizeLinear, TensorScatter"),
        ({"providers": [CPU]}, "its libraries cannot be loaded"),
        ({"fails": errors.EPFail("CUDA failure 35\nmore")}, "CUDA failure 35"),
        ({"fails": RuntimeError("no kernel image")}, "no kernel image"),
        ({"broken": errors.Fail("out of memory\nat cuda.cc")}, "out of memory"),
        ({"broken": errors.NotImplemented("TensorScatter(24)")}, "TensorScatter(24)"),
    ],
)
def test_whatever_goes_wrong_with_cuda_leaves_the_cpu_and_says_why(manifest, traits, reason):
    runner, said = open_runner(manifest, threads=1, cuda=pretended(**traits))
    assert (runner.device, said.startswith("CUDA: "), said.endswith(reason)) == ("cpu", True, True), said
    assert "\n" not in said
    ids, pixels = inputs(manifest.config)
    twin, _ = open_runner(manifest, threads=1)
    np.testing.assert_array_equal(Session(manifest, runner).logits(ids, pixels), Session(manifest, twin).logits(ids, pixels))


def test_a_failure_later_names_the_way_out(manifest):
    runner, _ = open_runner(manifest, cuda=pretended())
    runner._language._broken = errors.Fail("out of memory\nat cuda.cc")
    with pytest.raises(UserError, match=r"^ONNX Runtime failed on CUDA \(out of memory\); use --runtime onnxruntime:cpu$"):
        Session(manifest, runner).logits(np.arange(5, 10)[None])


@pytest.mark.parametrize(
    ("providers", "gpu", "obstacle"),
    [
        ([CUDA, CPU], True, None),
        ([CUDA, CPU], False, "no NVIDIA GPU is here"),
        ([CPU], True, "for the GPU, install onnxruntime-gpu in place of onnxruntime"),
        ([CPU], False, ""),
    ],
)
def test_cuda_is_tried_where_runtime_and_gpu_have_it(providers, gpu, obstacle):
    assert Cuda(providers=lambda: providers, gpu=lambda: gpu).obstacle() == obstacle


def test_bfloat16_graphs_stay_on_the_cpu(manifest):
    runner, said = open_runner(replace(manifest, float_type="bfloat16"), threads=1, cuda=pretended())
    assert (runner.device, said) == ("cpu", "CUDA: numpy has no bfloat16 to hand over")


def test_what_a_real_session_reports_is_understood(manifest):
    """On this machine all nodes go to the CPU: the list of them must be found, and hold what the graphs are made of."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(manifest.file("language_onnx")), options, providers=[CPU])
    left = find_ops_outside(session.get_provider_graph_assignment_info(), CUDA)
    assert left >= {"TensorScatter", "Attention", "RMSNormalization", "RotaryEmbedding"}
    assert find_ops_outside(session.get_provider_graph_assignment_info(), CPU) == set()
    assert left & HEAVY_OPS


def test_every_operation_on_weights_or_caches_counts_as_heavy(manifest):
    """Whatever takes a weight of two dimensions or a cache, except the look-up of rows."""
    for part in ("vision", "language"):
        graph = ir.load(manifest.file(f"{part}_onnx")).graph
        for node in graph:
            large = [v for v in node.inputs if v is not None and v.is_initializer() and len(v.shape) > 1]
            caches = [v for v in node.inputs if v is not None and (v.name or "").startswith("past_key_values")]
            if large or caches:
                assert node.op_type in HEAVY_OPS | {"Gather", "Add"}, node


def session_on(manifest, runtime, **machine):
    return open_session(manifest, runtime, threads=1, machine=Machine(gpu=lambda: True, **machine))


@pytest.mark.parametrize(
    ("runtime", "device", "why"),
    [
        ("auto", "cuda", "this export has no engine"),
        ("onnxruntime", "cuda", "as asked"),
        ("onnxruntime:cpu", "cpu", "as asked"),
    ],
)
def test_the_session_takes_cuda_unless_the_cpu_was_asked_for(manifest, runtime, device, why):
    session = session_on(manifest, runtime, cuda=pretended())
    assert (session.runner.name, session.runner.device, session.why) == ("onnxruntime", device, why)


def test_the_session_says_why_there_is_no_cuda(manifest):
    session = session_on(manifest, "auto", cuda=pretended(left=["Attention"]))
    why = "this export has no engine; CUDA: this ONNX Runtime has no kernel for Attention"
    assert (session.runner.device, session.why) == ("cpu", why)


def test_one_reason_is_said_once(manifest):
    built = replace(manifest, backend={"name": "tensorrt-rtx", "version": "1", "targets": []})
    cuda = Cuda(providers=lambda: [CUDA, CPU], gpu=lambda: False)
    machine = Machine(installed=lambda _: True, gpu=lambda: False, cuda=cuda)
    assert open_session(built, "auto", threads=1, machine=machine).why == "no NVIDIA GPU is here"


def test_without_onnx_runtime_it_says_what_to_install(manifest):
    with pytest.raises(UserError, match=r"no engine, and ONNX Runtime is not installed; run: pip install .*\[cpu\]"):
        session_on(manifest, "auto", installed=lambda module: module != "onnxruntime")
