"""Prune the circuit of a task out of a run's sparse twin and save it in the run folder.

    python examples/find_circuit.py runs/tiny-demo --task bracket_counting

A task is a built-in name or a .jsonl file of pairs, perhaps with ":nonsense" for its control,
":longer" or ":distractors" behind it. A line of the file is
{"context_1": "...", "target_1": "...", "context_2": "...", "target_2": "...", "split": "train"}
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    p.add_argument("run_dir", help="a run folder, or tiny: the built-in run")
    p.add_argument("--task", default="single_double_quote")
    p.add_argument("--target_loss", type=float, default=0.15, help="nats per prompt to reach")
    p.add_argument("--prune_steps", type=int, default=600, help="optimizer steps on the masks")
    p.add_argument("--force", action="store_true", help="prune even if the twin cannot do the task")
    args = p.parse_args()

    from bridges import load_run
    from sparse import PruneConfig, get_task, prune

    task = get_task(args.task)
    run = load_run(args.run_dir)
    print(f"twin: {task.score(run.sparse, run.tokenizer)}")
    config = PruneConfig(target_loss=args.target_loss, n_steps=args.prune_steps)
    forced = args.force or ":nonsense" in task.name  # nobody does a nonsense task
    circuit = prune(run.sparse, task, config, tokenizer=run.tokenizer, force=forced)
    folder = run.circuit_folder(task.name)
    circuit.save(folder)

    print(circuit)
    print(f"{len(circuit.edges(run.sparse))} edges; nodes by location:")
    for location, indices in circuit.nodes.items():
        print(f"  {location:18} {len(indices):4}  {' '.join(map(str, indices[:12]))}")
    print(f"saved in {folder}")
    print(f"next: python examples/map_to_dense.py {args.run_dir} --task {task.name}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
