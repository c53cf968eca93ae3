"""Evaluate a run folder: python -m evals RUN_DIR"""

from __future__ import annotations

import argparse
import sys

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description="Judge the claims about a run's circuits and measure its bridges, each beside "
        "what could refute it; write report.json, report.md and report.html into the run folder, "
        "and the twin's model card. Finished parts are kept: interrupt it, and start it again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a folder that train_bridge.py wrote")
    parser.add_argument("--tasks", nargs="+", help="circuits to judge, by task name; all if none")
    parser.add_argument("--draws", type=int, default=39, help="draws of every empty control")
    parser.add_argument("--pairs", type=int, default=64, help="most pairs of a split")
    parser.add_argument("--seed", type=int, default=0, help="seed of every control")
    parser.add_argument("--quick", action="store_true", help="19 draws, 24 pairs and no facts")
    parser.add_argument("--no_facts", action="store_true", help="only what verdicts rest on")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run and print its table; return the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    for name in ("draws", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")

    from bridges import load_run
    from evals.report.report import table

    from .cache import forget
    from .evaluate import evaluate_run, write_report

    try:
        run = load_run(args.run_dir)
        cache = run.output / "evaluated"
        if args.fresh:
            forget(cache)
        report = evaluate_run(
            run,
            tasks=args.tasks,
            draws=args.draws,
            max_pairs=args.pairs,
            facts=not args.no_facts,
            seed=args.seed,
            quick=args.quick,
            cache=cache,
            progress=sys.stderr.isatty(),
        )
        paths = write_report(run, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; start it again, without --fresh, to go on from what is finished",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(table(report))
    print("\nwrote " + "\n      ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
