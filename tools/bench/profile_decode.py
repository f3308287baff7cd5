"""Profile of decoding on a CPU: milliseconds a token by operator type, from ONNX Runtime's profiler.

    python -m tools.families.make_random_llava --like 1b-quarter --out build/quarter
    qvlm-export --model build/quarter --out build/quarter.plan --backend onnx --samples 1 --max-length 1024
    python -m tools.bench.profile_decode build/quarter.plan [--fast]

For every node the fastest of all steps counts, so that other load on the machine affects the result little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from qvlm_export.engines.manifest import Manifest, read_manifest
from qvlm_export.engines.runtime.onnx_runner import OnnxRunner, open_float32_session
from qvlm_export.engines.runtime.session import Session

HEAD = "lm_head"
PROMPT_TOKENS = 640  # an image and a question


def profile(manifest: Manifest, threads: int, fast: bool, steps: int) -> list[dict[str, object]]:
    """Profiler events of ONNX Runtime over `steps` decoded tokens, without the prompt."""
    files = {part: (manifest.file(f"{part}_onnx"), manifest.file(f"{part}_data")) for part in ("vision", "language")}
    with tempfile.TemporaryDirectory() as folder:
        vision = open_float32_session(*files["vision"], threads)
        language = open_float32_session(*files["language"], threads, fast, Path(folder) / "decode")
        session = Session(manifest, OnnxRunner(manifest, vision, language))
        sequences = session.start([np.random.default_rng(0).integers(5, 300, PROMPT_TOKENS)])
        list(session.generate(sequences, steps + 1, frozenset()))
        events: list[dict[str, object]] = json.loads(Path(language.end_profiling()).read_text())
    runs = [event["ts"] for event in events if event.get("name") == "model_run"]
    return [event for event in events if event["ts"] >= runs[1]]  # the first run is the prompt


def fastest_ms(events: list[dict[str, object]]) -> Counter[str]:
    """Milliseconds per step by operator type; the matrix product of lm_head has its own entry."""
    nodes: dict[str, tuple[str, float]] = {}
    for event in events:
        name, kind = str(event["name"]), event["args"].get("op_name") if event.get("cat") == "Node" else None
        if kind is not None and name.endswith("_kernel_time"):
            kind = HEAD if HEAD in name and "MatMul" in kind else kind
            nodes[name] = (kind, min(event["dur"] / 1000, nodes.get(name, (kind, np.inf))[1]))
    totals: Counter[str] = Counter()
    for kind, milliseconds in nodes.values():
        totals[kind] += milliseconds
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    totals = fastest_ms(profile(read_manifest(args.plan.with_suffix(".json")), args.threads, args.fast, args.steps))
    for kind, milliseconds in totals.most_common():
        print(f"{kind:24} {milliseconds:8.3f} ms  {100 * milliseconds / totals.total():5.1f} %")
    print(f"{'all nodes':24} {totals.total():8.3f} ms")


if __name__ == "__main__":
    main()
