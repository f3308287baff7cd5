"""The use of CUDA by ONNX Runtime, tested without a GPU: CPU sessions over the float16 graphs stand in for CUDA sessions."""

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


class FakeCudaSession:
    """A CPU session that claims to run on a GPU, except the operators in `left`. broken: error that every run raises."""

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


def fake_cuda(created=None, fails=None, **traits):
    """`Cuda` as on a machine with a GPU. created: collects the arguments of every session. fails: error to raise instead."""

    def create(path, options, providers, enable_fallback):
        if created is not None:
            created.append((path, providers, enable_fallback))
        if fails is not None:
            raise fails
        return FakeCudaSession(ort.InferenceSession(path, options, providers=[CPU]), **traits)

    return Cuda(providers=lambda: [CUDA, CPU], gpu=lambda: True, create=create, memory="cpu")


def inputs(config):
    """Token ids and pixels of a prompt with one random image."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
    return np.array([[1, *[config.image_token_id] * config.vision.tokens_per_image, 7, 9, 11]]), pixels


def test_cuda_runs_the_float16_graphs_as_they_are_written(manifest):
    created = []
    runner, reason = open_runner(manifest, cuda=fake_cuda(created))
    assert (runner.name, runner.device, reason) == ("onnxruntime", "cuda", "")
    graphs = [str(manifest.file(f"{part}_onnx")) for part in ("vision", "language")]
    assert created == [(graph, [CUDA, CPU], 0) for graph in graphs]  # the graphs as written, and no silent fallback
    cpu_runner, _ = open_runner(manifest, threads=1)
    ids, pixels = inputs(manifest.config)
    assert runner.embed_images(pixels).dtype == np.float16
    # In the tower's INT8 products, a difference in rounding is a whole step.
    for arguments, allowed in (((np.arange(5, 30)[None], None), 0.01), ((ids, pixels), 0.1)):
        logits, expected = (Session(manifest, r).logits(*arguments) for r in (runner, cpu_runner))
        assert logits.dtype == np.float32
        assert 0 < np.linalg.norm(logits - expected) < allowed * np.linalg.norm(expected)


def test_float16_caches_keep_earlier_tokens(manifest):
    runner, _ = open_runner(manifest, cuda=fake_cuda())
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
def test_after_any_failure_of_cuda_the_cpu_is_used_with_a_reason(manifest, traits, reason):
    runner, message = open_runner(manifest, threads=1, cuda=fake_cuda(**traits))
    assert (runner.device, message.startswith("CUDA: "), message.endswith(reason)) == ("cpu", True, True), message
    assert "\n" not in message
    ids, pixels = inputs(manifest.config)
    expected, _ = open_runner(manifest, threads=1)
    np.testing.assert_array_equal(
        Session(manifest, runner).logits(ids, pixels), Session(manifest, expected).logits(ids, pixels)
    )


def test_a_later_failure_names_the_remedy(manifest):
    runner, _ = open_runner(manifest, cuda=fake_cuda())
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
def test_cuda_is_tried_where_the_runtime_supports_it_and_a_gpu_is_present(providers, gpu, obstacle):
    assert Cuda(providers=lambda: providers, gpu=lambda: gpu).obstacle() == obstacle


def test_bfloat16_graphs_stay_on_the_cpu(manifest):
    runner, message = open_runner(replace(manifest, float_type="bfloat16"), threads=1, cuda=fake_cuda())
    assert (runner.device, message) == ("cpu", "CUDA: numpy has no bfloat16 to hand over")


def test_the_node_assignment_of_a_real_session_is_read(manifest):
    """Here all nodes are assigned to the CPU: the assignment must be readable and hold the operators of the graph."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(manifest.file("language_onnx")), options, providers=[CPU])
    operators = find_ops_outside(session.get_provider_graph_assignment_info(), CUDA)
    assert operators >= {"TensorScatter", "Attention", "RMSNormalization", "RotaryEmbedding"}
    assert find_ops_outside(session.get_provider_graph_assignment_info(), CPU) == set()
    assert operators & HEAVY_OPS


def test_every_operation_on_weights_or_caches_counts_as_heavy(manifest):
    """Every operator that reads a two-dimensional weight or a cache, except the lookup and addition of table rows."""
    for part in ("vision", "language"):
        graph = ir.load(manifest.file(f"{part}_onnx")).graph
        for node in graph:
            large = [v for v in node.inputs if v is not None and v.is_initializer() and len(v.shape) > 1]
            caches = [v for v in node.inputs if v is not None and (v.name or "").startswith("past_key_values")]
            if large or caches:
                assert node.op_type in HEAVY_OPS | {"Gather", "Add"}, node


def session_on(manifest, runtime, **machine):
    """Opens a session as on a machine with a GPU."""
    return open_session(manifest, runtime, threads=1, machine=Machine(gpu=lambda: True, **machine))


@pytest.mark.parametrize(
    ("runtime", "device", "why"),
    [
        ("auto", "cuda", "this export has no engine"),
        ("onnxruntime", "cuda", "as asked"),
        ("onnxruntime:cpu", "cpu", "as asked"),
    ],
)
def test_the_session_uses_cuda_unless_the_cpu_was_requested(manifest, runtime, device, why):
    session = session_on(manifest, runtime, cuda=fake_cuda())
    assert (session.runner.name, session.runner.device, session.why) == ("onnxruntime", device, why)


def test_the_session_gives_the_reason_against_cuda(manifest):
    session = session_on(manifest, "auto", cuda=fake_cuda(left=["Attention"]))
    why = "this export has no engine; CUDA: this ONNX Runtime has no kernel for Attention"
    assert (session.runner.device, session.why) == ("cpu", why)


def test_a_reason_that_occurs_twice_is_given_once(manifest):
    with_engine = replace(manifest, backend={"name": "tensorrt-rtx", "version": "1", "targets": []})
    cuda = Cuda(providers=lambda: [CUDA, CPU], gpu=lambda: False)
    machine = Machine(installed=lambda _: True, gpu=lambda: False, cuda=cuda)
    assert open_session(with_engine, "auto", threads=1, machine=machine).why == "no NVIDIA GPU is here"


def test_without_onnx_runtime_the_error_names_what_to_install(manifest):
    with pytest.raises(UserError, match=r"no engine, and ONNX Runtime is not installed; run: pip install 'onnxruntime"):
        session_on(manifest, "auto", installed=lambda module: module != "onnxruntime")
