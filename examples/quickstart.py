"""A circuit of the sparse twin moves the dense model: in under a minute, with nothing to train.

    python examples/quickstart.py

Opens the built-in run (a small dense model of Python code, its sparse twin, the bridges between
them and a pruned circuit), carries the circuit over and tests it in the dense model beside its
controls. `--prune` finds the circuit anew; examples/train_bridge.py makes such a run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--prune", type=int, metavar="STEPS", help="prune the circuit anew, 600 is good")
    p.add_argument("--draws", type=int, default=19, help="draws of every empty control")
    args = p.parse_args()

    import torch

    from bridges import load_run, map_circuit
    from evals import Report, evaluate_circuit, evaluate_transfer, table
    from sparse import PruneConfig, get_task, prune

    run = load_run("tiny")
    task = get_task("single_double_quote")
    circuit = run.circuits()[task.name]
    if args.prune:
        circuit = prune(run.sparse, task, PruneConfig(n_steps=args.prune))
    print(f"{run.dense.describe()}\n\n{circuit}\n")

    mapped = map_circuit(circuit, run.dense)  # the same circuit, as edits of the dense model
    batch = task.batch(run.tokenizer, "test").take(torch.tensor([0]))  # one pair of prompts
    before = run.dense.last_logits(batch.ids, batch.last)  # at the scored position of each prompt
    after = mapped.steer(batch.ids, batch.counterfactual(), positions=batch.last[:, None])[:, 0]
    for i, ids in enumerate(batch.ids):
        own, other = (run.tokenizer.decode(x[i]) for x in (batch.target, batch.foil))
        up, down = batch.foil[i], batch.target[i]
        p0, p1 = (float((y[i, up] - y[i, down]).sigmoid()) for y in (before, after))
        print(f"{run.tokenizer.decode(ids)!r}, then {other!r} rather than {own!r}:")
        print(f"    probability {p0:.3f}, steered {p1:.3f}")

    found = run.circuits()
    twin = None if args.prune else found[f"{task.name}:nonsense"]  # None: learned now
    others = {name: found[name] for name in ("while_return_true", "else_elif")}
    given = dict(nonsense=twin, namesakes=others, draws=args.draws, max_pairs=24, facts=False)
    in_twin = evaluate_circuit(run.sparse, circuit, run.tokenizer, **given)
    in_dense = evaluate_transfer(mapped, others=[c.task for c in others.values()], **given)
    claims = (*in_twin.claims, *in_dense.claims)
    print("\n" + table(Report(title=task.meaning, claims=claims, sections={})))


if __name__ == "__main__":
    main()
