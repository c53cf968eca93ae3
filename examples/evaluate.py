"""Judge the four claims about one circuit of a run, and keep the report.

    python examples/evaluate.py runs/tiny-demo --task single_double_quote

`python -m evals RUN_DIR` does this for all circuits of a run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    p.add_argument("run_dir", help="a run folder with the circuit (examples/find_circuit.py)")
    p.add_argument("--task", default="single_double_quote")
    p.add_argument("--draws", type=int, default=39, help="draws of every empty control")
    p.add_argument("--seed", type=int, default=0, help="seed of every control")
    p.add_argument("--output_dir", help="default: RUN_DIR/evaluations/TASK")
    args = p.parse_args()

    from bridges import load_run, map_circuit
    from evals import Report, evaluate_bridge, evaluate_circuit, evaluate_transfer, namesakes_of
    from sparse import get_task

    run = load_run(args.run_dir)
    found = run.circuits()
    name = get_task(args.task).name if ".jsonl" in args.task else args.task
    if (circuit := found.get(name)) is None:
        sys.exit(f"{args.run_dir} has circuits for {list(found)}; examples/find_circuit.py prunes")
    others = namesakes_of(found, name)
    text = run.heldout()
    twin = found.get(f"{name}:nonsense")  # what the same search finds for nonsense
    beside = dict(nonsense=twin, namesakes=others, draws=args.draws, seed=args.seed)
    mapped = map_circuit(circuit, run.dense, run.bridges, sparse_model=run.sparse)
    in_twin = evaluate_circuit(run.sparse, circuit, run.tokenizer, blocks=text[:16], **beside)
    beside |= dict(others=[c.task for c in others.values()], heldout=text[:16])
    in_dense = evaluate_transfer(mapped, **beside)
    rows = {"the bridges": tuple(evaluate_bridge(run, text))}
    rows |= {"in the sparse model": in_twin.rows, "in the dense model": in_dense.rows}
    report = Report(
        title=f"{name} in {run.dense.name}",
        claims=(*in_twin.claims, *in_dense.claims),
        sections=rows,
        pictures=in_dense.pictures,
        provenance={"draws": args.draws, "seed": args.seed, "run": run.manifest},
    )
    print(report)
    print("wrote", *report.save(args.output_dir or run.output / "evaluations" / name))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
