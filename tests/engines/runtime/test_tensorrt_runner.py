"""The TensorRT runner on a fake TensorRT and a fake GPU: error messages of engines that cannot run, and device memory."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tensorrt import CAPABILITY, VERSION, FakeDevice, FakeTensorRT, Validity
from small_export import open_small

from qvlm_export.calibrate.checkpoint.prefix import PrefixCache
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits
from qvlm_export.engines.manifest import Manifest, describe_file
from qvlm_export.engines.runtime.device import Device, UnusableEngineError
from qvlm_export.engines.runtime.open import Machine, open_session
from qvlm_export.engines.runtime.tensorrt_runner import TensorRTRunner

PLANS = (b"vision", b"language")
LIMITS = Limits(max_length=16, max_batch=2, max_images=1)


@pytest.fixture
def manifest(llava, tmp_path):
    """An export whose engines are the bytes b"vision" and b"language"."""
    files = {}
    for part in ("vision", "language"):
        (tmp_path / f"{part}.plan").write_bytes(part.encode())
        files[f"{part}_plan"] = describe_file(tmp_path / f"{part}.plan")
    return Manifest(
        path=tmp_path / "x.json",
        model={},
        config=open_small(llava()).config,
        limits=LIMITS,
        float_type="float16",
        scheme="int4",
        linears={},
        calibration={},
        backend={"name": "tensorrt-rtx", "version": VERSION, "targets": ["sm80", CAPABILITY]},
        plan_check=(),
        interface={},
        versions={},
        files=files,
    )


def open_engine(trt, device=None):
    """The `open_engine` of a `Machine`: engines of the fake module on the fake device."""
    return lambda manifest, name: TensorRTRunner(manifest, name, lambda _: trt, lambda: device or FakeDevice())


def machine_of(engine, **changes):
    """A machine with a GPU and all modules, where `engine` opens engines."""
    return Machine(**({"installed": lambda _: True, "gpu": lambda: True, "open_engine": engine} | changes))


def refusal_of(manifest, machine, runtime="tensorrt-rtx"):
    """Opens a session, which must fail with one line; returns it."""
    with pytest.raises(UserError) as caught:
        open_session(manifest, runtime, machine=machine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


REMEDY = "; export again here, or use --runtime onnxruntime"


@pytest.mark.parametrize("validity", [None, Validity.VERSION_MISMATCH, Validity.MALFORMED_ENGINE])
def test_the_error_for_a_plan_of_another_version_names_both(manifest, validity):
    older = replace(manifest, backend={**manifest.backend, "version": "1.6.0.23"})
    machine = machine_of(open_engine(FakeTensorRT(manifest.config, validity=validity)))
    assert refusal_of(older, machine) == (
        f"--runtime tensorrt-rtx: vision.plan: was built with tensorrt-rtx 1.6.0.23, here is {VERSION}, and a plan runs on "
        f"the version that built it{REMEDY}"
    )


@pytest.mark.parametrize("validity", [None, Validity.UNSUPPORTED_CC])
def test_the_error_for_a_plan_for_another_gpu_names_both(manifest, validity):
    other = replace(manifest, backend={**manifest.backend, "targets": ["sm120", "sm121"]})
    machine = machine_of(open_engine(FakeTensorRT(manifest.config, validity=validity)))
    expected = f"--runtime tensorrt-rtx: vision.plan: was built for sm120, sm121, the GPU here is {CAPABILITY}{REMEDY}"
    assert refusal_of(other, machine) == expected


def test_without_findings_the_error_quotes_tensorrt(manifest):
    built = replace(manifest, backend={"name": "tensorrt", "version": VERSION, "targets": []})
    message = refusal_of(built, machine_of(open_engine(FakeTensorRT(manifest.config))), "tensorrt")
    assert message == (
        f"--runtime tensorrt: vision.plan: tensorrt {VERSION} does not take it on this GPU, {CAPABILITY} "
        f"(Error Code 6: engine is not compatible){REMEDY}"
    )
    silent = machine_of(open_engine(FakeTensorRT(manifest.config, says="")))
    assert "(no reason given)" in refusal_of(built, silent, "tensorrt")


def test_the_error_names_all_findings_of_tensorrt_rtx(manifest):
    findings = Validity.OLD_CUDA_DRIVER | Validity.INSUFFICIENT_GPU_MEMORY
    message = refusal_of(manifest, machine_of(open_engine(FakeTensorRT(manifest.config, validity=findings))))
    assert "driver of this machine is too old for it; update the driver; this GPU has too little free memory" in message


def test_a_plan_for_the_current_gpu_is_not_reported_as_built_for_another(manifest):
    current = replace(manifest, backend={**manifest.backend, "targets": ["current"]})
    message = refusal_of(current, machine_of(open_engine(FakeTensorRT(manifest.config))))
    assert f"does not take it on this GPU, {CAPABILITY} (Error Code 6" in message


def test_too_little_memory_for_the_context_is_reported(manifest):
    trt = FakeTensorRT(manifest.config, plans=PLANS, memory=False)
    message = refusal_of(manifest, machine_of(open_engine(trt)))
    assert "vision.plan: no memory on this GPU for its execution context" in message


def test_a_missing_gpu_is_reported(manifest):
    machine = machine_of(open_engine(FakeTensorRT(manifest.config)), gpu=lambda: False)
    expected = "--runtime tensorrt-rtx: no NVIDIA GPU is here; use --runtime onnxruntime"
    assert refusal_of(manifest, machine) == expected


def test_a_missing_tensorrt_is_reported(manifest):
    machine = machine_of(open_engine(None), installed=lambda module: module != "tensorrt_rtx")
    expected = "--runtime tensorrt-rtx: tensorrt-rtx is not installed; use --runtime onnxruntime"
    assert refusal_of(manifest, machine) == expected


def test_an_engine_of_another_tensorrt_than_requested_is_refused(manifest):
    expected = "--runtime tensorrt: this export's engine is for tensorrt-rtx; use --runtime onnxruntime"
    assert refusal_of(manifest, machine_of(open_engine(None)), "tensorrt") == expected


def test_missing_cuda_bindings_are_reported(manifest):
    def load():
        raise ImportError("No module named 'cuda'")

    def engine(manifest, name):
        return TensorRTRunner(manifest, name, lambda _: FakeTensorRT(manifest.config), lambda: Device(load))

    message = refusal_of(manifest, machine_of(engine))
    assert message == f"--runtime tensorrt-rtx: cuda-bindings is not installed (pip install cuda-bindings){REMEDY}"


def test_a_tensorrt_that_does_not_load_is_reported(manifest):
    def load(module):
        raise OSError(f"lib{module}.so: cannot open shared object file")

    message = refusal_of(manifest, machine_of(lambda manifest, name: TensorRTRunner(manifest, name, load)))
    assert "tensorrt-rtx cannot be loaded (libtensorrt_rtx.so: cannot open shared object file)" in message


def test_an_error_of_cuda_is_named():
    class Error(IntEnum):
        cudaErrorMemoryAllocation = 2  # noqa: N815

    runtime = SimpleNamespace(cudaStreamCreate=lambda: (Error.cudaErrorMemoryAllocation, None))
    with pytest.raises(
        UnusableEngineError, match=r"^the GPU reports cudaErrorMemoryAllocation; export with a smaller --max"
    ):
        Device(lambda: runtime)


@pytest.mark.parametrize("role", ["vision_plan", "language_plan"])
def test_a_changed_plan_is_refused_before_tensorrt_sees_it(manifest, role):
    path = manifest.file(role)
    path.write_bytes(path.read_bytes()[::-1])
    trt, device = FakeTensorRT(manifest.config, plans=PLANS), FakeDevice()
    for runtime in ("tensorrt-rtx", "auto"):  # auto refuses it as well
        message = refusal_of(manifest, machine_of(open_engine(trt, device)), runtime)
        assert message.startswith(f"{path}: its sha256 is ")
        assert device.closed


def test_auto_falls_back_to_the_graph_with_the_reason(manifest):
    """There is no graph beside these plans; the error about it shows that the graph was tried."""
    older = replace(manifest, backend={**manifest.backend, "version": "1.6.0.23"})
    message = refusal_of(older, machine_of(open_engine(FakeTensorRT(manifest.config))), "auto")
    assert "has no vision_onnx" in message
    nowhere = machine_of(open_engine(FakeTensorRT(manifest.config)), installed=lambda module: module != "onnxruntime")
    assert refusal_of(older, nowhere, "auto").startswith("vision.plan: was built with tensorrt-rtx 1.6.0.23, here is")


@pytest.fixture
def opened(manifest):
    """A session on fake engines: session, contexts of vision and language, device."""
    trt, device = FakeTensorRT(manifest.config, plans=PLANS), FakeDevice()
    with open_session(manifest, machine=machine_of(open_engine(trt, device))) as session:
        yield session, *trt.contexts, device


def test_an_engine_that_can_run_is_used(opened):
    session, *_ = opened
    assert (session.runner.name, session.runner.device) == ("tensorrt-rtx", "cuda")
    assert session.why == "a GPU and the runtime are here"


def test_past_and_present_are_one_buffer_of_device_memory(opened):
    session, _, language, device = opened
    sequences = session.start([np.arange(5, 9), np.arange(5, 8)])
    list(session.generate(sequences, 3, frozenset()))
    text = session.manifest.config.text
    names = [f"key_values.{i}.{kind}" for i in range(text.num_layers) for kind in ("key", "value")]
    assert len(language.runs) == 3  # the prompt and two tokens; the third is read from the last logits
    for run in language.runs:
        assert [run[f"past_{name}"] for name in names] == [run[f"present_{name}"] for name in names]
        assert len({run[f"past_{name}"] for name in names}) == len(names)
    shape = (2, text.num_kv_heads, LIMITS.max_length, text.head_dim)
    assert {language.shapes[f"past_{name}"] for name in names} == {shape}
    assert {device.memory[language.runs[0][f"past_{name}"]] for name in names} == {2 * int(np.prod(shape))}


def test_a_cache_is_freed_with_its_sequences(opened):
    session, _, _, device = opened
    before = None
    for _ in range(3):
        sequences = session.start([np.arange(5, 9)])
        del sequences
        before = before or device.unfreed
        assert device.unfreed == before


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_cache_that_does_not_fit_frees_what_it_allocated(opened, monkeypatch):
    session, _, _, device = opened
    before, remaining = device.unfreed, iter([None] * 3)

    def allocate(count_bytes):
        if next(remaining, "none") == "none":
            raise UserError("the GPU reports cudaErrorMemoryAllocation")
        return FakeDevice.allocate(device, count_bytes)

    monkeypatch.setattr(device, "allocate", allocate)
    with pytest.raises(UserError, match="cudaErrorMemoryAllocation"):
        session.start([np.arange(5, 9)])
    assert device.next > max(before, default=0)
    assert device.unfreed == before


def test_nothing_is_written_beyond_the_cache(opened):
    session, _, language, _ = opened
    sequences = session.start([np.arange(5, 5 + 10)])
    runs_before = len(language.runs)
    with pytest.raises(UserError, match="context would be 17 tokens long, the engine was built for 16"):
        session.extend(sequences, [np.arange(5, 12)])
    assert len(language.runs) == runs_before


def test_a_shape_that_the_engine_refuses_is_named(opened):
    session, _, language, _ = opened
    language.accepts = False
    with pytest.raises(UserError, match=r"^input_ids: shape \[1, 4\] is outside what the engine was built for$"):
        session.start([np.arange(5, 9)])


def test_a_failed_run_is_an_error_that_quotes_tensorrt(opened):
    session, _, language, _ = opened
    language.execute_async_v3 = lambda _: False
    with pytest.raises(UserError, match=r"^TensorRT could not run the engine \(no reason given\)$"):
        session.start([np.arange(5, 9)])


def test_closing_frees_the_device(opened):
    session, _, _, device = opened
    session.start([np.arange(5, 9)])
    session.runner.close()
    assert (device.closed, device.unfreed) == (True, [])
    session.runner.close = lambda: None  # because the fixture closes it as well


def test_the_real_tensorrt_rtx_refuses_other_bytes_and_prints_nothing(manifest, capfd):
    """The real module's answer to bytes that are no engine, which the fakes above imitate."""
    trt = pytest.importorskip("tensorrt_rtx")
    built = replace(manifest, backend={**manifest.backend, "version": trt.__version__})
    message = refusal_of(built, machine_of(open_engine(trt)))
    assert message == f"--runtime tensorrt-rtx: vision.plan: TensorRT-RTX does not take it for an engine{REMEDY}"
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_prefix_is_copied_into_the_first_slots_of_every_sequence(manifest):
    text, tokens = manifest.config.text, 3
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((text.num_kv_heads, tokens, text.head_dim)).astype(np.float32) for _ in range(2)]
    prefix = PrefixCache((5, 6, 7), (arrays[0],) * text.num_layers, (arrays[1],) * text.num_layers)
    device = FakeDevice()
    runner = open_engine(FakeTensorRT(manifest.config, PLANS), device)(manifest, "tensorrt-rtx")
    cache = runner.new_cache(2, prefix)
    slot = text.head_dim * 2  # bytes, in float16
    for name, address in cache.address.items():
        expected = arrays[name.endswith("value")].astype(np.float16)
        for row in range(2):
            for head in range(text.num_kv_heads):
                place = address + (row * text.num_kv_heads + head) * LIMITS.max_length * slot
                np.testing.assert_array_equal(device.uploads[place], expected[head])
    del cache
    runner.close()
    assert device.unfreed == []
