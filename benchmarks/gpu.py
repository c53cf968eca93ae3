"""One table of a GPU: every kernel and step, to its reference and to the floor of the hardware.

    python benchmarks/gpu.py                        # on CUDA; writes runs/gpu/gpu.json and gpu.md
    python benchmarks/gpu.py --device cpu --small   # every line of it, in toy shapes, on a CPU

Every part runs in a process of its own, which is ended when its time is over. What a part had
measured by then is kept. A part that failed, or was not run, is told with the reason; the others
go on, and the exit status is 1. docs/gpu.md says what is measured, and how floors are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import monotonic

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARTS = {  # name: seconds at most on a GPU
    "ceilings": 60,
    "abs_topk": 60,
    "projection": 60,
    "attention": 60,
    "losses": 60,
    "pretraining": 60,
    "gpt2-12gb": 70,
    "gpt2-80gb": 90,
    "gpt2-12gb compiled": 120,
    "gpt2-80gb compiled": 150,
}
OFF = 0.05
"""Largest difference from the reference, over its largest entry, that bfloat16 may make."""
COLUMNS = ("what", "ms (quartiles)", "reference / this", "this / floor", "off by", "tokens/s")
COLUMNS += ("peak GB", "plan GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toy shapes, which a CPU needs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=400, help="for all parts together")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        here(args.device, *args.only)
        return 0
    if (args.device == "cpu") != args.small:
        parser.error("--device cpu and --small belong together: a CPU would take days otherwise")
    if why := lacking(args.device):
        parser.error(why)
    said = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu.json").write_text(json.dumps(said, indent=1) + "\n")
    (args.output / "gpu.md").write_text(table(said))
    print(table(said))
    return 1 if said["failed"] else 0


def lacking(device: str) -> str:
    """Return what is missing for a device, and nothing where all is there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA device here; --device cpu --small runs every "
            "part in toy shapes"
        )
    return ""


def measure(args: argparse.Namespace) -> dict:
    """Run every part in a process of its own; return rows, failures and facts."""
    begun, rows, failed, top = monotonic(), [], {}, {}
    for name in dict.fromkeys(["ceilings", *args.parts]):
        left = args.seconds - (monotonic() - begun)
        if name != "ceilings" and not top:
            failed[name] = "not run: without ceilings there are no floors"
        elif left < 10:
            failed[name] = f"not run: the {args.seconds:g} seconds for all parts were over"
        else:
            found, why = apart(name, args.device, top, min(left, PARTS[name]))
            if not why and any(not (r.get("apart") or 0.0) <= OFF for r in found):
                why = f"a result is off by more than {OFF:g} of the largest entry (see its row)"
            if name == "ceilings":
                top = found[0] if found else {}
            else:
                rows += found
            failed |= {name: why} if why else {}
            print(f"{name}: {why or 'done'}", file=sys.stderr)
    return {"facts": facts(args.device), "ceilings": top, "rows": rows, "failed": failed}


def apart(name: str, device: str, top: dict, seconds: float) -> tuple[list[dict], str]:
    """Return the rows of a part that ran in a process of its own, and why it failed, if it did."""
    words = [sys.executable, __file__, "--device", device, "--only", name, json.dumps(top)]
    options = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | options
    )
    try:
        out, error = child.communicate(timeout=seconds)
        why = "" if child.returncode == 0 else last_line(error, child.returncode)
    except subprocess.TimeoutExpired:
        child.kill()
        out, error = child.communicate()
        why = f"its {seconds:.0f} seconds were over; the end of what it said: {last_line(error, 0)}"
    rows = [json.loads(line[4:]) for line in out.splitlines() if line.startswith("row ")]
    if not why and not rows:
        why = "it measured nothing"
    return rows, why


def last_line(error: str, status: int) -> str:
    """Return the last line that is about an error, or that there is none."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]]
    return (named or lines or [f"exit status {status}, and nothing was said"])[-1][:500]


def facts(device: str) -> dict:
    """Return what the numbers were measured on."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def here(device: str, name: str, top: str) -> None:
    """Run one part in this process, and print every row when it is known."""
    import torch
    from gpu_parts import kernels, steps
    from gpu_parts.measure import Ceilings, Clock, ceilings

    torch.manual_seed(0)
    clock = Clock(torch.device(device), repeats=15 if device == "cuda" else 3)
    if name == "ceilings":
        found = ceilings(clock)
        flops = {str(d): x for d, x in found.flops_per_second.items()}
        say({"bytes_per_second": found.bytes_per_second, "flops_per_second": flops})
        return
    known = json.loads(top)
    dtypes = {getattr(torch, d.split(".")[1]): x for d, x in known["flops_per_second"].items()}
    limits = Ceilings(bytes_per_second=known["bytes_per_second"], flops_per_second=dtypes)
    made = {
        "abs_topk": kernels.abs_topk_rows,
        "projection": kernels.projection_rows,
        "attention": kernels.attention_rows,
        "losses": kernels.loss_rows,
        "pretraining": steps.pretraining_rows,
    }
    for preset in ("gpt2-12gb", "gpt2-80gb"):
        made[preset] = steps.cotraining_rows(preset, False)
        made[f"{preset} compiled"] = steps.cotraining_rows(preset, True)
    if name not in ("abs_topk", "projection", "attention", "losses"):
        clock.repeats = 5 if device == "cuda" else 2  # a step is long
    for row in made[name](clock, limits):
        say(asdict(row) | {"to_reference": row.to_reference, "to_floor": row.to_floor})


def say(values: dict) -> None:
    print("row " + json.dumps(values), flush=True)


def table(said: dict) -> str:
    """Return everything as Markdown."""
    f, top = said["facts"], said["ceilings"]
    lines = [f"{f['device']}, torch {f['torch']}, Python {f['python']}", ""]
    if top:
        flops = ", ".join(f"{x / 1e12:.3g} {d[6:]}" for d, x in top["flops_per_second"].items())
        lines += [f"Measured: {top['bytes_per_second'] / 1e9:,.4g} GB/s, TFLOP/s: {flops}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for r in said["rows"]:
        low, high = r["quartiles"]
        cells = (
            f"{r['part']}: {r['case']}; against {r['reference']}",
            f"{r['ms']:.4g} ({low:.4g}-{high:.4g})",
            f"{r['to_reference']:.3g}",
            f"{r['to_floor']:.3g}",
            "" if r["apart"] is None else f"{r['apart']:.0e}",
            "" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:,.0f}",
            *("" if r[k] is None else f"{r[k] / 1e9:.2f}" for k in ("peak", "planned")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name} failed: {why}" for name, why in said["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
