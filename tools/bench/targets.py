"""Engine size and build time for growing sets of GPU targets, from which the default of `--target` was chosen.

python -m tools.bench.targets --model tiny --scheme int4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import qvlm_export
from qvlm_export.engines.backend import INT4_TARGETS, choose_backend
from qvlm_export.engines.builder.build import BuildJob, build_engines, language_profile, vision_profile
from qvlm_export.engines.manifest import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scheme", default="int4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "m.plan"
        qvlm_export.export(args.model, out, scheme=args.scheme, backend="onnx")
        manifest = read_manifest(out.with_suffix(".json"))
        profiles = {
            "vision": vision_profile(manifest.config, manifest.limits),
            "language": language_profile(manifest.config, manifest.limits),
        }
        print("| targets | language plan, bytes | vision plan, bytes | build, s |\n|---|---|---|---|")
        for count in range(1, len(INT4_TARGETS) + 1):
            backend = choose_backend("tensorrt-rtx", INT4_TARGETS[:count])
            jobs = [
                BuildJob(str(manifest.file(f"{part}_onnx")), f"{scratch}/{part}.plan", profiles[part])
                for part in ("language", "vision")
            ]
            language, vision = build_engines(backend, jobs, lambda *_: None)
            seconds = language.seconds + vision.seconds
            print(
                f"| {' '.join(backend.targets)} | {language.plan_bytes} | {vision.plan_bytes} | {seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
