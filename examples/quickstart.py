"""The whole way in a few minutes on a CPU: twin, bridges, circuit, and the dense model moved.

    python examples/quickstart.py

The shortest program that uses all four packages, and far too short a training: its verdicts will
say so. examples/train_bridge.py is the same in earnest.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--steps", type=int, default=150, help="of the training, and of the pruning")
    p.add_argument("--draws", type=int, default=100, help="random directions to compare with")
    p.add_argument("--output_dir", default="runs/quickstart", help="the run folder to write")
    args = p.parse_args()

    from bridges import BridgeConfig, BridgeSet, CotrainConfig, cotrain, map_circuit, save_run
    from dense import tiny
    from evals import Report, evaluate_circuit, evaluate_transfer, table
    from sparse import (
        Batches,
        PruneConfig,
        SparseGPT,
        SparseGPTConfig,
        TrainConfig,
        get_task,
        load_corpus,
        pack,
        prune,
    )

    dense, corpus = tiny(), load_corpus()  # the text: the standard library's own sources
    train = pack(corpus.train[:300], dense.tokenizer, 64)
    heldout = pack(corpus.validation[:30], dense.tokenizer, 64)[:16]
    twin = SparseGPT(SparseGPTConfig(vocab_size=dense.vocab_size, num_hidden_layers=dense.n_layers))
    bridges = BridgeSet(BridgeConfig.between(dense, twin, k=64))
    config = CotrainConfig(train=TrainConfig(steps=args.steps, folder=args.output_dir))
    cotrain(dense, twin, bridges, Batches(train, 8), config)
    more = {"heldout": heldout, "means_from": train[:64], "facts": {"example": __file__}}
    run = save_run(args.output_dir, dense, twin, bridges, **more)

    task = get_task("single_double_quote")
    circuit = prune(run.sparse, task, PruneConfig(n_steps=args.steps))
    circuit.save(run.circuit_folder(task.name))
    mapped = map_circuit(circuit, dense, bridges)
    found = evaluate_circuit(run.sparse, circuit, run.tokenizer, draws=args.draws // 5)
    moved = evaluate_transfer(mapped, draws=args.draws, max_pairs=24)
    rows = {"sparse model": tuple(found), "dense model": tuple(moved)}
    print(table(Report(title=task.meaning, sections=rows)))


if __name__ == "__main__":
    main()
