"""Carry a circuit to the dense model and steer that model with it, beside a random circuit.

python examples/map_to_dense.py runs/tiny-demo --task single_double_quote

h_s <- h_s + strength * (what the change of the circuit's nodes decodes to at site s)
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
    p.add_argument("--site", type=int, help="residual site; default: the best on validation")
    p.add_argument("--seed", type=int, default=0, help="seed of the random circuit")
    args = p.parse_args()

    from bridges import load_run, map_circuit
    from sparse import get_task, task_nats

    run = load_run(args.run_dir)
    found = run.circuits()
    name = get_task(args.task).name if ".jsonl" in args.task else args.task
    if name not in found:
        prune = f"python examples/find_circuit.py {args.run_dir} --task {args.task}"
        sys.exit(f"{args.run_dir} has circuits for {list(found)}; first: {prune}")
    circuit = found[name]
    mapped = map_circuit(circuit, run.dense)
    site = mapped.site if args.site is None else args.site
    print(f"{len(circuit)} nodes as edits of {run.dense.name} at site {site}; effect per site:")
    print("  " + "  ".join(f"{s}: {logits:+.2f}" for s, logits in mapped.site_effects.items()))

    batch = circuit.task.batch(run.tokenizer, "test")
    ids, other = batch.ids, batch.counterfactual()
    last = batch.last[:, None]  # the scored position of every prompt: logits are wanted there only
    control = list(circuit.random(run.sparse, args.seed))
    print("P(target of the other context, rather than the own one), mean over the test split:")
    for strength in (0.0, 0.5, 1.0, 2.0):
        chances = []
        for nodes in (list(circuit), control):
            how = {"nodes": nodes, "site": site, "strength": strength, "positions": last}
            nats = task_nats(mapped.steer(ids, other, **how).squeeze(1), batch)
            chances.append((1 - (-nats).exp()).mean().item())
        print(f"  strength {strength}: {chances[0]:.3f}   random circuit: {chances[1]:.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
