"""Engine builds: shape profiles, reports, and one-line errors for everything that fails in the build process."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from onnx import TensorProto, helper
from small_export import open_small
from small_graphs import INPUTS, PROFILE, attention_model, build, int4_model, int8_model, make_model, tensor

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import Backend, choose_backend
from qvlm_export.engines.builder.build import BuildJob, build_engines, language_profile, vision_profile
from qvlm_export.engines.config import Limits


def refusal_of(pattern, *arguments, **options):
    """Builds, which must fail with one line that matches; returns it."""
    with pytest.raises(UserError, match=pattern) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_language_profile_covers_decode_prefill_and_every_cache(llava):
    config = open_small(llava()).config
    profile = language_profile(config, Limits(max_length=200, max_batch=3, max_images=4))
    assert profile["input_ids"] == profile["position_ids"] == ((1, 1), (1, 100), (3, 200))  # 36 image tokens and 64 more
    assert profile["write_index"] == ((1,), (1,), (3,))
    assert profile["image_embeds"] == ((1, 256), (36, 256), (144, 256))
    caches = {name: shapes for name, shapes in profile.items() if name.startswith("past_key_values.")}
    assert sorted(caches) == [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert set(caches.values()) == {((1, 2, 200, 64), (1, 2, 200, 64), (3, 2, 200, 64))}
    assert len(profile) == 4 + 4


def test_the_usual_prompt_is_no_longer_than_the_longest(llava):
    config = open_small(llava()).config
    assert language_profile(config, Limits(max_length=40))["input_ids"] == ((1, 1), (1, 40), (1, 40))


def test_vision_profile_covers_one_image_to_the_limit(llava):
    profile = vision_profile(open_small(llava()).config, Limits(max_length=200, max_images=3))
    assert profile == {"pixel_values": ((1, 3, 48, 48), (1, 3, 48, 48), (3, 3, 48, 48))}


def test_a_report_holds_sizes_time_and_memory_of_the_build(tmp_path):
    progress = []
    for name, model in (("one", int8_model()), ("two", int4_model(block_size=128))):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    jobs = [BuildJob(str(tmp_path / f"{n}.onnx"), str(tmp_path / f"{n}.plan"), PROFILE) for n in ("one", "two")]
    reports = build_engines(choose_backend("tensorrt-rtx", ("sm89",)), jobs, lambda *step: progress.append(step))
    assert [report.plan for report in reports] == [job.plan for job in jobs]
    for report, weight_bytes in zip(reports, (256 * 512, 256 * 512 // 2), strict=True):
        assert report.plan_bytes == os.path.getsize(report.plan)
        assert weight_bytes <= report.weights_bytes <= 1.1 * weight_bytes
        assert 0 < report.seconds < 60
        assert 50e6 < report.peak_bytes < 50e9
    for job in jobs:
        fractions = [fraction for plan, fraction in progress if plan == job.plan]
        assert len(fractions) > 2
        assert fractions == sorted(fractions)
        assert 0 < fractions[0] < fractions[-1] == 1.0


def test_a_dropped_input_is_an_error(tmp_path):
    model, profile = attention_model(with_lengths=True)
    message = refusal_of(r"^small\.onnx: TensorRT dropped a part of the graph", model, tmp_path, profile)
    assert "Unused Input: lengths" in message


def test_the_same_graph_without_the_dropped_input_builds(tmp_path):
    model, profile = attention_model(with_lengths=False)
    assert build(model, tmp_path, profile).plan_bytes == (tmp_path / "small.plan").stat().st_size


def test_an_operator_without_support_is_named_with_its_node(tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"], name="the.bad.node"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    shape = ["rows", INPUTS]
    model = make_model(nodes, [tensor("x", TensorProto.FLOAT, shape)], [tensor("y", TensorProto.FLOAT, shape)], {})
    refusal_of(r"^small\.onnx: TensorRT cannot parse node the\.bad\.node \(DynamicQuantizeLinear\)", model, tmp_path)


def test_int4_for_a_gpu_without_it_is_refused_with_the_reason(tmp_path):
    message = refusal_of(r"^small\.onnx: TensorRT cannot build it: ", int4_model(block_size=128), tmp_path, target="sm75")
    assert "sm75" in message
    assert "int4" in message


def test_a_missing_profile_is_refused_with_the_reason(tmp_path):
    refusal_of(r"^small\.onnx: TensorRT cannot build it: .*\bx\b.* profile", int8_model(), tmp_path, {})


@pytest.mark.parametrize("content", [b"hello", b"", b"\x08\xff"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    refusal_of(r"^small\.onnx: TensorRT cannot ", content, tmp_path)


def test_weights_that_are_missing_are_refused(tmp_path):
    model = int8_model()
    for stored in model.graph.initializer:
        if stored.name == "codes":
            stored.ClearField("raw_data")
            stored.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "gone.data"), ("offset", "0"), ("length", str(256 * 512))):
                stored.external_data.add(key=key, value=value)
    refusal_of(r"^small\.onnx: TensorRT cannot parse .*Failed to import initializer: codes", model, tmp_path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    backend = choose_backend("tensorrt-rtx", ("sm89",))
    with pytest.raises(UserError, match=re.escape("absent.onnx")):
        build_engines(backend, [BuildJob(str(tmp_path / "absent.onnx"), str(tmp_path / "a.plan"), {})], lambda *_: None)


def test_a_process_that_dies_is_an_error_and_does_not_hang(tmp_path, capfd):
    backend = Backend("tensorrt-rtx", "no_such_tensorrt", "1.0", ())
    with pytest.raises(UserError, match=r"^a\.onnx: the tensorrt-rtx build process ended with code 1; its words are above$"):
        build_engines(backend, [BuildJob(str(tmp_path / "a.onnx"), str(tmp_path / "a.plan"), {})], lambda *_: None)
    assert "no_such_tensorrt" in capfd.readouterr().err


def test_a_killed_process_is_distinguished_from_a_failed_one(tmp_path, monkeypatch):
    (tmp_path / "suicidal_tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    backend = Backend("tensorrt-rtx", "suicidal_tensorrt", "1.0", ())
    with pytest.raises(UserError, match=r"ended with code -9; it was killed, most likely for memory$"):
        build_engines(backend, [BuildJob("b.onnx", "b.plan", {})], lambda *_: None)


def test_output_of_libraries_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "chatty_tensorrt.py").write_text("print('hello'); print('[1, 2]'); print(7)\nfrom tensorrt_rtx import *\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "a.onnx").write_bytes(int8_model().SerializeToString())
    job = BuildJob(str(tmp_path / "a.onnx"), str(tmp_path / "a.plan"), PROFILE)
    (report,) = build_engines(Backend("tensorrt-rtx", "chatty_tensorrt", "1.0", ("sm89",)), [job], lambda *_: None)
    assert report.plan == job.plan


def test_the_working_directory_is_not_imported_from(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')\n")
    monkeypatch.chdir(tmp_path)
    assert build(int8_model(), tmp_path).plan_bytes > 0


def test_a_later_failure_names_its_own_file(tmp_path):
    (tmp_path / "good.onnx").write_bytes(int8_model().SerializeToString())
    (tmp_path / "bad.onnx").write_bytes(np.random.default_rng(0).bytes(100))
    jobs = [BuildJob(str(tmp_path / f"{n}.onnx"), str(tmp_path / f"{n}.plan"), PROFILE) for n in ("good", "bad")]
    with pytest.raises(UserError, match=r"^bad\.onnx: "):
        build_engines(choose_backend("tensorrt-rtx", ("sm89",)), jobs, lambda *_: None)
