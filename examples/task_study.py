"""What a pair of models does of every task, and how small the circuits are: one table.

    python examples/task_study.py tiny --output_dir runs/task-study

Every task is scored in the dense model and in the twin, beside chance. Where both do it, circuits
are pruned for it and for its nonsense twin (in the direction that the twin likes better), with
several seeds. Circuits are kept in the output folder, so that an interrupted study goes on where it
stopped. It writes README.md and study.json.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HEAD = """\
| task | frames | dense | twin | paired | nodes | test loss | nonsense: nodes | test loss |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    p.add_argument("run_dir", help="a run folder, or tiny")
    p.add_argument("--output_dir", type=Path, required=True)
    p.add_argument("--tasks", nargs="+", default=["all"], help="names or .jsonl files")
    p.add_argument("--seeds", type=int, default=3, help="pruning seeds per task")
    p.add_argument("--prune_steps", type=int, default=600)
    args = p.parse_args()

    from bridges import choose_tasks, load_run
    from sparse import easier_nonsense, task_table

    run = load_run(args.run_dir)
    tasks = choose_tasks(args.tasks)
    models = {"dense": run.dense, "twin": run.sparse}
    tables = {name: task_table(model, run.tokenizer, tasks) for name, model in models.items()}
    scored = [{score.task: score for score in table.scores} for table in tables.values()]
    rows, lines = [], [HEAD]
    for task in tasks:
        if not all(task.name in scores for scores in scored):
            continue
        dense, twin = (scores[task.name] for scores in scored)
        row = {"task": task.name, "frames": dense.levels.get("frame", 0)}
        row |= {"dense": round(dense.nats, 4), "twin": round(twin.nats, 4)}
        row |= {"dense_paired": round(dense.paired, 3), "twin_paired": round(twin.paired, 3)}
        row |= {"last_token": dense.told_by_last_token}
        if dense.does and twin.does:
            row["circuits"] = circuits(args, run, task)
            row["nonsense"] = circuits(args, run, easier_nonsense(task, run.sparse, run.tokenizer))
        rows.append(row)
        lines.append(line(row))
        print(lines[-1], flush=True)
    refused = ["- " + " ".join(r.why.split()) for r in tables["dense"].refused]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "study.json").write_text(json.dumps(rows, indent=1))
    text = "\n".join([*lines, "", "Not expressed by this tokenizer:", "", *refused])
    (args.output_dir / "README.md").write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"wrote {args.output_dir / 'README.md'}")


def circuits(args, run, task) -> list[dict]:
    """Nodes, validation and test loss of the circuit of every seed."""
    from dataclasses import asdict

    from sparse import Circuit, PruneConfig, prune

    found, mark = [], run.sparse.fingerprint()
    for seed in range(args.seeds):
        folder = args.output_dir / f"seed-{seed}" / task.name.replace(":", "-")
        config = PruneConfig(n_steps=args.prune_steps, seed=seed)
        there = Circuit.load(folder) if (folder / "circuit.json").is_file() else None
        if there is not None and there.made_as(task, mark, asdict(config)):
            circuit = there
        else:
            circuit = prune(run.sparse, task, config, tokenizer=run.tokenizer, force=True)
            circuit.save(folder)
        losses = {split: circuit.loss[f"circuit/{split}"] for split in ("validation", "test")}
        found.append({"nodes": len(circuit), "met": circuit.met, **losses})
    return found


def line(row: dict) -> str:
    """A row of the table; sizes are of circuits that reach 0.15 nats on validation."""
    cells = [f"`{row['task']}`", str(row["frames"]), f"{row['dense']:.3f}", f"{row['twin']:.3f}"]
    cells.append(f"{row['dense_paired']:.2f}, {row['twin_paired']:.2f}")
    for kind in ("circuits", "nonsense"):
        of = row.get(kind, [])
        sizes = [str(c["nodes"]) if c["met"] else f"({c['nodes']})" for c in of]
        cells += [" ".join(sizes), " ".join(f"{c['test']:.2f}" for c in of)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; start the same command again to go on")
