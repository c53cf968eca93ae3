"""Evaluate a run folder: python -m evals RUN_DIR"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description="Test a run's bridges and circuits beside their controls; write report.json, "
        "report.md and report.html into the run folder, and the twin's model card.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a folder that train_bridge.py wrote")
    parser.add_argument("--tasks", nargs="+", help="circuits to test, by task name; default: all")
    parser.add_argument("--draws", type=int, default=100, help="random directions per claim")
    parser.add_argument("--seed", type=int, default=0, help="seed of every control")
    parser.add_argument("--quick", action="store_true", help="fewer pairs, strengths and blocks")
    args = parser.parse_args(arguments)
    if args.draws < 1:
        parser.error(f"--draws {args.draws} must be at least 1; 100 is what the claims ask for")

    from bridges import load_run
    from evals.report.report import table

    from .evaluate import evaluate_run, write_report

    try:
        run = load_run(args.run_dir)
        report = evaluate_run(
            run,
            tasks=args.tasks,
            draws=args.draws,
            seed=args.seed,
            quick=args.quick,
            progress=sys.stderr.isatty(),
        )
        paths = write_report(run, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    print("\nwrote " + "\n      ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
