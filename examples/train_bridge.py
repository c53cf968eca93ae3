"""The main job: co-train a weight-sparse twin and its bridges, prune circuits, test them.

    accelerate launch examples/train_bridge.py --dense tiny
    accelerate launch examples/train_bridge.py --dense gpt2 --dataset text/ --output_dir runs/gpt2

Writes a run folder: the twin, the bridges, a circuit per task with its nonsense twin, and a report
of every claim beside its control. Started again with the same settings it resumes.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QUOTES = ["single_double_quote"]
ALL = [*QUOTES, "bracket_counting", "while_return_true"]
PRESETS = {
    # optimizer steps of batch x length tokens; the twin's width over the dense one; pruning steps
    "smoke": dict(steps=6, batch=4, length=32, expansion=0.5, prune_steps=4, tasks=QUOTES),
    "demo": dict(steps=500, batch=16, length=128, expansion=2, prune_steps=200, tasks=QUOTES),
    "long": dict(steps=3000, batch=16, length=128, expansion=2, prune_steps=600, tasks=ALL),
}


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dense", default="tiny", help="tiny, a Hugging Face name, or a folder")
    p.add_argument("--dataset", help="file, folder or dataset name; default: Python's own sources")
    p.add_argument("--output_dir", help="default: runs/<dense>-<preset>")
    p.add_argument("--preset", choices=PRESETS, default="demo", help="how long to train")
    p.add_argument("--steps", type=int, help="optimizer steps, instead of the preset's")
    p.add_argument("--batch", type=int, help="sequences per step, over all processes")
    p.add_argument("--length", type=int, help="tokens per sequence")
    p.add_argument("--expansion", type=float, help="width of the twin over the dense width")
    p.add_argument("--twin_layers", type=int, help="layers of the twin; default: the dense depth")
    p.add_argument(
        "--sites",
        type=site_map,
        default="even",
        help="which dense residual site is bridged to which sparse one: even, or D:S,D:S,...",
    )
    p.add_argument("--density", type=float, default=1 / 16, help="weights kept in the matrices")
    p.add_argument("--prune_steps", type=int, help="optimizer steps of the pruning")
    p.add_argument("--tasks", nargs="*", help="tasks to prune circuits for")
    p.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="CPU threads per process; default: its share")
    p.add_argument("--processes", type=int, help="refuse to train on another number of processes")
    args = p.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in {
        "steps": 1,
        "batch": 1,
        "length": 2,
        "prune_steps": 0,
        "threads": 1,
        "processes": 1,
        "twin_layers": 1,
    }.items():
        if (value := getattr(args, name)) is not None and value < least:
            p.error(f"--{name} {value} must be at least {least}")
    if args.expansion <= 0:
        p.error(f"--expansion {args.expansion} must be above 0")
    args.output_dir = args.output_dir or f"runs/{Path(args.dense).name}-{args.preset}"
    if Path(args.output_dir).is_file():
        p.error(f"--output_dir {args.output_dir} is a file; name a folder, there or to be made")
    return args


def site_map(text: str) -> dict[int, int]:
    """{dense site: sparse site} of D:S,D:S,...; empty, which is the even map, for "even"."""
    if text == "even":
        return {}
    pairs = [[int(site) for site in pair.split(":")] for pair in text.split(",")]
    if len({d for d, _ in pairs}) < len(pairs):
        raise ValueError(text)
    return {d: s for d, s in pairs}


def main() -> None:
    args = parse()
    import torch
    from accelerate import Accelerator

    from bridges import BridgeSet, cotrain, save_run
    from dense import DenseModel
    from sparse import Batches, get_task

    for name in args.tasks:
        get_task(name)  # an unknown one is told before anything is trained
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    say = accelerator.print
    share = (os.cpu_count() or 1) // accelerator.num_processes
    torch.set_num_threads(args.threads or max(1, share))  # accelerate launch would leave one
    threads = torch.get_num_threads()
    say(f"{accelerator.num_processes} process(es) on {accelerator.device}, {threads} threads each")
    dense = DenseModel.from_pretrained(args.dense)
    say(dense.describe())
    if dense.tokenizer is None:
        raise ValueError(f"{args.dense} has no tokenizer; save one beside the model's weights")
    sparse, config, shape = design(args, dense)
    say(f"twin: {sparse.num_parameters():,} parameters, {config.sparsity.density:.4f} kept")
    train, heldout, facts = read_text(args, dense.tokenizer)
    say(f"text: {facts['data']['name']}, {train.numel():,} training tokens")
    bridges = BridgeSet(shape, seed=args.seed)
    batches = Batches(train, args.batch, args.seed)
    cotrain(dense, sparse, bridges, batches, config, heldout.split(16)[:4], accelerator)
    if accelerator.is_main_process:
        facts |= {"command": " ".join(sys.argv), "arguments": vars(args)}
        run = save_run(
            args.output_dir,
            dense,
            sparse,
            bridges,
            heldout=heldout,
            means_from=train[:256],
            facts=facts,
        )
        find_circuits(args, run, say)
        report(args, run, say)
    accelerator.end_training()


def read_text(args, tokenizer):
    """Training blocks, held-out blocks, and what to say of them."""
    from sparse import load_corpus, pack

    corpus = load_corpus(args.dataset)
    cache = Path(args.output_dir).parent / "tokens"  # shared by the runs beside each other
    train = pack(corpus.train, tokenizer, args.length, cache=cache)
    heldout = pack(corpus.validation, tokenizer, args.length, cache=cache)
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint, "tokens": train.numel()}
    return train, heldout[:64], {"data": data}


def design(args, dense):
    """The twin, its training and the bridges' shape."""
    import torch

    from bridges import BridgeConfig, CotrainConfig
    from sparse import SparseGPT, SparseGPTConfig, SparsityConfig, TrainConfig

    width = max(16, int(args.expansion * dense.d_resid) // 16 * 16)
    torch.manual_seed(args.seed)
    sparse = SparseGPT(
        SparseGPTConfig(
            vocab_size=dense.vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=args.twin_layers or dense.n_layers,
            num_attention_heads=width // 16,
            head_dim=16,
            max_position_embeddings=max(256, args.length),
            positions="learned",
            eos_token_id=dense.tokenizer.eos_token_id,
        )
    )
    config = CotrainConfig(
        train=TrainConfig(
            steps=args.steps,
            folder=args.output_dir,
            seed=args.seed,
            evaluate_every=max(1, args.steps // 10),
            checkpoint_every=max(1, min(100, args.steps // 5)),
            mixed_precision=args.mixed_precision,
            processes=args.processes,
        ),
        sparsity=SparsityConfig(density=args.density, embedding_density=min(1, 4 * args.density)),
    )
    config.sparsity.check(sparse)
    return sparse, config, BridgeConfig.between(dense, sparse, k=width // 4, sites=args.sites)


def find_circuits(args, run, say) -> None:
    """Prune a circuit for every task and its nonsense twin; keep those made just so before."""
    from dataclasses import asdict

    from sparse import PruneConfig, get_task, prune

    config = PruneConfig(n_steps=args.prune_steps, seed=args.seed)
    done, mark, settings = run.circuits(), run.sparse.fingerprint(), asdict(config)
    for name in args.tasks:
        for task in (get_task(name), get_task(f"{name}:nonsense")):
            old = done.get(task.name)
            if old and old.model_fingerprint == mark and settings.items() <= old.config.items():
                continue
            try:
                circuit = prune(run.sparse, task, config)
            except ValueError as error:
                say(f"{task.name} cannot be done here: {error}")
                break
            circuit.save(run.circuit_folder(task.name))
            say(str(circuit))


def report(args, run, say) -> None:
    """Test everything beside its controls, print the table and what to do next."""
    from evals import evaluate_run, table, write_report

    result = evaluate_run(run, seed=args.seed, quick=args.preset == "smoke", progress=True)
    paths = write_report(run, result)
    say(table(result))
    say("\nwrote " + "\n      ".join(str(path) for path in paths))
    say(
        "next:\n"
        f"  open {paths[-1]} in a browser\n"
        f"  python -m evals {run.folder}                      the same report again\n"
        f"  python examples/map_to_dense.py {run.folder}      edit the dense model yourself\n"
        f"  python examples/find_circuit.py {run.folder} --task FILE.jsonl     your own task"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; start the same command again to resume")
