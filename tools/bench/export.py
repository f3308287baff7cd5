"""What an export costs at several sizes: seconds by stage, peak memory, bytes read and written.

    python -m tools.bench.export --sizes 1b,llava-7b,llava-13b --effort rtn --work /big/disk --out docs/bench_export.json

Makes each checkpoint (`make_random_llava.py`), runs `qvlm-export --dry-run` for the estimate and then the export itself in a
process of its own, adds a row to the JSON and deletes what it made, so that the largest size decides the disk. `tiny` is the
model of the package. Bytes are those of storage (/proc/self/io), so a warm cache shows as few bytes read. Seconds are given
as they passed and as the processors counted them, with the load average beside them: a busy machine stretches the first.
`--plot docs/bench_export.png` draws cost against parameters from all rows there are.
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

from qvlm_export.calibrate.checkpoint.calibrated import write_json

mpl.use("agg")
import matplotlib.pyplot as plt

TINY = "tiny"
ESTIMATED = ("seconds", "calibration_floor_seconds", "memory_bytes", "build_memory_bytes", "disk_bytes")


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command that prints JSON; wall and processor seconds, peak resident bytes, bytes of storage."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched: dict[str, int] = {}
    watcher = threading.Thread(target=_watch_io, args=(process.pid, watched))
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
        **watched,
        "said": json.loads(stdout),
    }


def _watch_io(process: int, watched: dict[str, int]) -> None:
    """Keeps the last counts until the process is gone; a build's bytes are its own process's, and count when it ends."""
    folder = Path(f"/proc/{process}")
    while True:
        try:
            counts = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
            status = dict(line.split(":\t") for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        except OSError:
            return
        if "VmHWM" not in status:  # it has ended
            return
        watched |= {"read_bytes": int(counts["read_bytes"]), "written_bytes": int(counts["write_bytes"])}
        watched["peak_bytes"] = 1024 * int(status["VmHWM"].split()[0])
        time.sleep(0.05)


def bench(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row. The checkpoint and the export are gone afterwards unless --keep."""
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
    estimated = measured([*command, "--dry-run"])["said"]
    found = measured(command)
    said = found.pop("said")
    sizes = {name: sum(part[name] for part in estimated["parts"].values()) for name in ("float16_bytes", "weights_bytes")}
    row = {
        "size": size,
        "effort": args.effort,
        "samples": args.samples,
        "backend": args.backend,
        "parameters": sizes["float16_bytes"] // 2,
        **found,
        "seconds": said["seconds"],
        "processor_seconds": said["processor_seconds"],
        "build_peak_bytes": max((e.get("peak_bytes", 0) for e in said["files"].values()), default=0),
        "float16_bytes": sizes["float16_bytes"],
        "data_bytes": sum(e["bytes"] for role, e in said["files"].items() if role.endswith("_data")),
        "plan_bytes": sum(e["bytes"] for role, e in said["files"].items() if role.endswith("_plan")),
        "estimated": {name: estimated[name] for name in ESTIMATED},
        "load_before": args.load,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    if not args.keep:
        shutil.rmtree(out)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Processor seconds and peak memory against parameters, for each effort and kind of processor."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["parameters"]):
        vectors = row["machine"].split(", ")[2:]  # older rows do not say
        lines.setdefault(", ".join([row["effort"], *vectors]), []).append(row)
    for label, mine in sorted(lines.items()):
        billions = [row["parameters"] / 1e9 for row in mine]
        axes[0].plot(billions, [row["cpu_seconds"] for row in mine], "o-", label=label)
        axes[1].plot(billions, [row["peak_bytes"] / 2**30 for row in mine], "o-", label=label)
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
