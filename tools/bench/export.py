"""Benchmark of whole exports at several model sizes: seconds by stage, peak memory, bytes read and written.

    python -m tools.bench.export --sizes 1b,llava-7b,llava-13b --effort rtn --work /big/disk --out docs/bench_export.json

For each size this makes a random checkpoint (`tools/families/make_random_llava.py`), runs `qvlm-export --dry-run` for the
estimate, then runs the export in its own process, adds a row to the JSON and deletes checkpoint and export, so that the disk
only has to hold the largest size. The size `tiny` stands for the model of the package. Bytes are read from and written to
storage (/proc/PID/io), so with a warm page cache few bytes are read. Both wall seconds and processor seconds are recorded,
beside the load average, because a busy machine lengthens the wall time. `--plot docs/bench_export.png` draws the cost over
the number of parameters from all rows of the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from qvlm_export.calibrate.checkpoint.files import write_json

mpl.use("agg")
import matplotlib.pyplot as plt

TINY = "tiny"
ESTIMATES = ("seconds", "calibration_floor_seconds", "memory_bytes", "build_memory_bytes", "disk_bytes")


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command that prints JSON; raises SystemExit if it fails.

    Returns the JSON as "output", with wall and processor seconds, peak resident bytes, and bytes read from and written to
    storage.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    counters: dict[str, int] = {}
    watcher = threading.Thread(target=_poll_counters, args=(process.pid, counters))
    watcher.start()
    stdout = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return {
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **counters,
        "output": json.loads(stdout),
    }


def _poll_counters(process: int, counters: dict[str, int]) -> None:
    """Updates `counters` with the kernel's counters of the process until it ends.

    The kernel adds the bytes of a child process, such as an engine build, when the child ends.
    """
    folder = Path(f"/proc/{process}")
    while True:
        try:
            io = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
            status = dict(line.split(":\t") for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        except OSError:
            return
        if "VmHWM" not in status:  # a zombie: the process has ended
            return
        counters |= {"read_bytes": int(io["read_bytes"]), "written_bytes": int(io["write_bytes"])}
        counters["peak_bytes"] = 1024 * int(status["VmHWM"].split()[0])
        time.sleep(0.05)


def bench(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the export of one model size; returns a row of the JSON. Without --keep it deletes what it made."""
    checkpoint, out = args.work / f"checkpoint-{size}", args.work / f"export-{size}"
    if size != TINY and not (checkpoint / "model.safetensors.index.json").exists():
        tool = "tools.families.make_random_llava"
        subprocess.run([sys.executable, "-m", tool, "--like", size, "--out", checkpoint], check=True)
    model = TINY if size == TINY else str(checkpoint)
    command = [
        str(Path(sys.executable).with_name("qvlm-export")),
        "--model",
        model,
        "--out",
        str(out / "engine.plan"),
        "--json",
    ]
    command += ["--effort", args.effort, "--samples", str(args.samples), "--backend", args.backend]
    command += ["--calib-data", "built-in"]  # random weights write nothing worth reading
    estimate = measured([*command, "--dry-run"])["output"]
    cost = measured(command)
    output = cost.pop("output")
    sizes = {name: sum(part[name] for part in estimate["parts"].values()) for name in ("float16_bytes", "weights_bytes")}
    row = {
        "size": size,
        "effort": args.effort,
        "samples": args.samples,
        "backend": args.backend,
        "parameters": sizes["float16_bytes"] // 2,
        **cost,
        "seconds": output["seconds"],
        "processor_seconds": output["processor_seconds"],
        "build_peak_bytes": max((e.get("peak_bytes", 0) for e in output["files"].values()), default=0),
        "float16_bytes": sizes["float16_bytes"],
        "data_bytes": sum(e["bytes"] for role, e in output["files"].items() if role.endswith("_data")),
        "plan_bytes": sum(e["bytes"] for role, e in output["files"].items() if role.endswith("_plan")),
        "estimated": {name: estimate[name] for name in ESTIMATES},
        "load_before": args.load,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    if not args.keep:
        shutil.rmtree(out)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws processor seconds and peak memory over parameters, one line for each effort and kind of processor."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["parameters"]):
        instruction_set = row["machine"].split(", ")[2:]  # older rows do not have it
        lines.setdefault(", ".join([row["effort"], *instruction_set]), []).append(row)
    for label, line in sorted(lines.items()):
        billions = [row["parameters"] / 1e9 for row in line]
        axes[0].plot(billions, [row["cpu_seconds"] for row in line], "o-", label=label)
        axes[1].plot(billions, [row["peak_bytes"] / 2**30 for row in line], "o-", label=label)
    for axis, ylabel in zip(axes, ("processor seconds, all stages", "GiB resident, without the engine build"), strict=True):
        axis.set(xlabel="billion parameters", ylabel=ylabel, xscale="log", yscale="log")
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="", help="tiny, 100m, 1b, llava-7b, llava-13b, with commas")
    parser.add_argument("--effort", default="rtn")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--work", type=Path, default=Path("build/bench_export"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and exports")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    args.work.mkdir(parents=True, exist_ok=True)
    for size in filter(None, args.sizes.split(",")):
        args.load = round(os.getloadavg()[0], 1)
        row = bench(size, args)
        rows = [r for r in rows if (r["size"], r["effort"], r["backend"]) != (size, args.effort, args.backend)] + [row]
        write_json(args.out, sorted(rows, key=lambda r: (r["effort"], r["parameters"])))
        print(json.dumps(row), flush=True)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
