"""Are the verdicts right where the answer is known? Nulls must not be positive, truths must.

    python benchmarks/calibration.py --output_dir runs/calibration
    python benchmarks/calibration.py --output_dir runs/calibration --table

Every case is asked with k = 19 draws of each empty control and 24 pairs. A case that is done is
never done again, so it can be interrupted and resumed; `--part 0/2` and `--part 1/2` share the work
between two processes. `--table` prints what is there as Markdown (docs/calibration/README.md).

accepted   at most 3 positives of 25 for each kind of null and claim, and a pooled one-sided 95 %
           bound below 10 %; at least 95 % of the truths positive; the share falls with the noise on
           the decoders (a null kind of its own, at kept length: `--ladder`)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from scipy.stats import beta
from tqdm import tqdm

from benchmarks.null_cases import NULLS, TASKS, TRUTHS, Case, cases, noised, shipped, with_decoders
from bridges.transfer.dense_circuit import DenseCircuit
from evals import judge_circuit
from evals.claims.carries import share
from evals.trials.arms import steering
from evals.trials.prompts import unrelated_splits

DRAWS, PAIRS = 19, 24
NOISES = (0, 0.5, 1, 2, 4, 8, 16)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--output_dir", required=True)
    p.add_argument("--nulls", type=int, default=25, help="cases of every kind of null")
    p.add_argument("--truths", type=int, default=200, help="planted truths")
    p.add_argument("--kinds", nargs="+", help="kinds of cases; default: all")
    p.add_argument("--part", default="0/1", help="i/n: every n-th case, from the i-th on")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--table", action="store_true", help="only print what is there")
    p.add_argument("--ladder", action="store_true", help="only the ladder of noise")
    return p.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(table(read(folder)))
    elif args.ladder:
        print(ladder())
    else:
        part, parts = map(int, args.part.split("/"))
        kinds = args.kinds or [TRUTHS, *NULLS]
        todo = [
            (kind, i)
            for i in range(max(args.nulls, args.truths))
            for kind in kinds
            if i < (args.truths if kind == TRUTHS else args.nulls)
        ][part::parts]
        judge(todo, folder, part)


def judge(todo: list[tuple[str, int]], folder: Path, part: int) -> None:
    """Judge the cases that are not done yet; every verdict is a line of its own file."""
    done = {(line["kind"], line["number"]) for line in read(folder)}
    with (folder / f"verdicts-{part}.jsonl").open("a") as out:
        for kind, i in tqdm([case for case in todo if case not in done]):
            start = time.perf_counter()
            _, case = next(cases(kind, range(i, i + 1), folder))
            verdicts = [verdict(case, claim, kind == TRUTHS) for claim in case.kinds]
            spent = round(time.perf_counter() - start, 1)
            line = {"kind": kind, "number": i, "task": case.circuit.task.name, "seconds": spent}
            out.write(json.dumps(line | {"claims": verdicts}) + "\n")
            out.flush()


def verdict(case: Case, kind: Any, at_once: bool) -> dict[str, Any]:
    """Return the verdict on one claim of a case, with the reason.

    Unless `at_once`, it is judged without namesakes first: a claim that is not positive then is not
    positive with them.
    """
    options = {"kinds": [kind], "draws": DRAWS, "max_pairs": PAIRS, "stop_early": True}

    def judged(namesakes: Any) -> Any:
        return judge_circuit(case.run, case.circuit, namesakes, case.others, **options)[0]

    claim = judged(case.namesakes() if at_once else {})
    if not at_once and claim.conditions[-1].key == "namesakes":  # all else holds
        claim = judged(case.namesakes())
    decided = claim.conditions[-1].key if claim.outcome != "positive" else ""
    return {
        "claim": claim.kind,
        "outcome": claim.outcome,
        "value": claim.value,
        "decided by": decided,
        "reason": claim.reason,
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """Return every line of every part, without half a last line."""
    lines = []
    for path in sorted(folder.glob("verdicts-*.jsonl")):
        text = path.read_text().splitlines(keepends=True)
        lines += [json.loads(line) for line in text if line.endswith("\n")]
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return positives of all cases, by kind and claim, and what decided against the others."""
    count: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    decided: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        for claim in line["claims"]:
            count[line["kind"], claim["claim"]][claim["outcome"]] += 1
            if claim["decided by"]:
                decided[line["kind"]][claim["decided by"].partition(".")[0]] += 1
    names = ("sufficient", "necessary", "carries", "needed")
    out = [
        "| kind | " + " | ".join(names) + " | decided against it, most often |",
        "|---|" + "--:|" * 4 + "---|",
    ]
    for kind in [TRUTHS, *NULLS]:
        cells = []
        for name in names:
            of = count.get((kind, name))
            untold = f" ({of['cannot tell']} untold)" if of and of["cannot tell"] else ""
            cells.append(f"{of['positive']} of {of.total()}{untold}" if of else "-")
        most = ", ".join(f"{key} {n}" for key, n in decided[kind].most_common(3))
        out.append(f"| {kind} | " + " | ".join(cells) + f" | {most} |")
    nulls = [c for (kind, _), c in count.items() if kind != TRUTHS]
    wrong, n = sum(c["positive"] for c in nulls), sum(c.total() for c in nulls)
    bound = beta.ppf(0.95, wrong + 1, n - wrong) if n > wrong else 1.0
    out += ["", f"Nulls: {wrong} of {n} positive, one-sided 95 % bound {bound:.3f}."]
    seconds = sum(line["seconds"] for line in lines)
    out.append(f"{len(lines)} cases, {seconds / 3600:.1f} hours of one process.")
    return "\n".join(out)


@torch.no_grad()
def ladder() -> str:
    """Return the shares of the true circuits under more and more noise on the decoders."""
    run, found = shipped()
    out = [
        "| noise, in norms of the decoder | " + " | ".join(TASKS) + " |",
        "|--:|" + "--:|" * len(TASKS),
    ]
    for times in NOISES:
        bridges = with_decoders(run.bridges, noised(times), 0)
        cells = []
        for name in TASKS:
            changed = SimpleNamespace(dense=run.dense, sparse=run.sparse, tokenizer=run.tokenizer)
            mapped = DenseCircuit(
                circuit=found[name], sparse=run.sparse, bridges=bridges, dense=run.dense, site=None
            )
            both, _ = unrelated_splits(mapped, found[name].task, changed.tokenizer, PAIRS)
            assert both is not None
            arm = both.placed("the circuit", steering(found[name]), share)
            cells.append(f"{share(both.test, both.run(arm)):.2f}")
        out.append(f"| {times:g} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
