"""The main job: co-train a weight-sparse twin and its bridges, prune circuits, test them.

    accelerate launch examples/train_bridge.py --dense tiny
    accelerate launch examples/train_bridge.py --dense gpt2 --dataset text/ --plan
    accelerate launch examples/train_bridge.py --dense gpt2 --dataset text/ --output_dir runs/gpt2

Without --preset, tiny and other models under 20 M parameters take demo; larger ones take gpt2-80gb
on a GPU of 70 GB or more and gpt2-12gb elsewhere, on a CPU too, where they say how long it takes.
--plan says what a run would take (parameters, memory, hours, disk) and writes nothing.

Writes a run folder: the twin, the bridges, a circuit per task with its nonsense twin, and a report
of every claim beside its control. Started again with the same settings it resumes. A task that the
dense model or the twin does not do (at most 0.3 nats) is skipped, and the reason is told. Without
--tasks, demo asks for one task, quotes; long and the gpt2 presets ask for all.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

QUOTES, ALL = ["single_double_quote"], ["all"]
PRESETS = {
    # optimizer steps of batch x length tokens; the twin's width over the dense one; pruning steps
    "smoke": dict(steps=6, batch=4, length=32, expansion=0.5, prune_steps=4, tasks=QUOTES),
    "demo": dict(steps=500, batch=16, length=128, expansion=2, prune_steps=200, tasks=QUOTES),
    "long": dict(steps=3000, batch=16, length=128, expansion=2, prune_steps=600, tasks=ALL),
    # 1 B tokens for a card of 80 GB, 0.2 B for one of 12: bf16, text read as it is needed
    "gpt2-80gb": dict(steps=30_000, batch=64, length=512, expansion=8 / 3, prune_steps=600),
    "gpt2-12gb": dict(steps=12_000, batch=32, length=512, expansion=4 / 3, prune_steps=600),
}
# found for the built-in model; at 3,000 steps other rates are best than at 500 (docs/bridge-study)
PRESETS["demo"] |= dict(lr=6e-2, bridge_lr=3e-2, encoder_k=1 / 2)
PRESETS["long"] |= dict(lr=3e-2, bridge_lr=5e-3, encoder_k=1 / 2, hybrid_weight=2.0)
GPT2 = dict(mixed_precision="bf16", stream=True, tasks=ALL)
PRESETS["gpt2-80gb"] |= GPT2 | dict(accumulate=2)
PRESETS["gpt2-12gb"] |= GPT2 | dict(accumulate=8)
PRESETS["smoke"] |= dict(force=True)  # in six steps no twin learns a task
DEFAULTS = dict(mixed_precision="no", stream=False, accumulate=1)  # where a preset says nothing
DEFAULTS |= dict(force=False)
DEFAULTS |= dict(lr=3e-2, bridge_lr=3e-3, encoder_k=1 / 4, hybrid_weight=1.0)
EVALUATED = 16  # held-out sequences scored at a time, at most
LEAST = dict(steps=1, batch=1, length=2, prune_steps=0, threads=1, processes=1, twin_layers=1)
LEAST["accumulate"] = 1


def parse() -> argparse.Namespace:
    """What the command line says; what makes no sense is refused before anything is loaded."""
    p = parser()
    args = p.parse_args()
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            p.error(f"--{name} {value} must be at least {least}")
    if args.expansion is not None and args.expansion <= 0:
        p.error(f"--expansion {args.expansion} must be above 0")
    if args.encoder_k is not None and not 0 < args.encoder_k <= 1:
        p.error(f"--encoder_k {args.encoder_k} must be above 0 and at most 1")
    if args.dense == "tiny" and args.preset is None:
        args.preset = "demo"
    if args.output_dir:
        folder = Path(args.output_dir)
        for path in (folder, *folder.parents):
            if path.is_file():
                p.error(
                    f"--output_dir {args.output_dir}: {path} is a file; name a folder, or one to "
                    "be made"
                )
    return args


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dense", default="tiny", help="tiny, a Hugging Face name, or a folder")
    p.add_argument("--dataset", help="file, folder or dataset name; default: Python's own sources")
    p.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="read and tokenize the text as it is needed, in its order; default in gpt2 presets",
    )
    p.add_argument("--output_dir", help="default: runs/<dense>-<preset>; tokens go beside it")
    p.add_argument("--preset", choices=PRESETS, help="how long to train, on what; see above")
    p.add_argument("--plan", action="store_true", help="say what the run would take, and stop")
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
    p.add_argument("--encoder_k", type=float, help="entries an encoder keeps / the twin's width")
    p.add_argument("--lr", type=float, help="peak learning rate of the twin")
    p.add_argument("--bridge_lr", type=float, help="peak learning rate of the bridges")
    p.add_argument("--hybrid_weight", type=float, help="weight of the hybrid passes in the loss")
    task_arguments(p)
    p.add_argument("--mixed_precision", choices=["no", "bf16"], help="default: the preset's")
    p.add_argument("--accumulate", type=int, help="passes per step, each on its share of the batch")
    p.add_argument("--compile", action="store_true", help="torch.compile both models' sublayers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="CPU threads per process; default: its share")
    p.add_argument("--processes", type=int, help="refuse to train on another number of processes")
    p.add_argument("--shard", action="store_true", help="split the parameters among processes")
    return p


def task_arguments(p: argparse.ArgumentParser) -> None:
    flag = argparse.BooleanOptionalAction
    p.add_argument("--prune_steps", type=int, help="optimizer steps of the pruning")
    p.add_argument("--tasks", nargs="*", help="names, .jsonl files of your own, or all; see above")
    p.add_argument(
        "--force", action=flag, help="prune tasks that a model does not do, too; smoke does"
    )


def site_map(text: str) -> dict[int, int]:
    """{dense site: sparse site} of D:S,D:S,...; empty, which is the even map, for "even"."""
    if text == "even":
        return {}
    pairs = [pair.split(":") for pair in text.split(",")]
    if not all(len(pair) == 2 and all(map(str.isdecimal, pair)) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is neither even nor D:S,D:S,...; try 0:0,4:2")
    if len({d for d, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a dense site twice")
    return {int(d): int(s) for d, s in pairs}


def fill_defaults(args, dense, device, processes=1) -> None:
    """Choose the preset where none was given, and what it leaves open; refuse what cannot be."""
    if args.preset is None:
        args.preset = preset_for(dense, device)
    for name, value in (DEFAULTS | PRESETS[args.preset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output_dir = args.output_dir or f"runs/{Path(args.dense).name}-{args.preset}"
    if args.batch % (processes * args.accumulate):
        raise ValueError(
            f"--batch {args.batch} cannot be shared by {processes} process(es) in "
            f"{args.accumulate} passes; give a multiple of {processes * args.accumulate}"
        )
    limit = getattr(dense.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and args.length > limit:
        raise ValueError(f"{args.dense} has {limit} positions; give --length {limit} or less")


def preset_for(dense, device) -> str:
    """The preset for a model and the card at hand."""
    import torch

    if dense.model.num_parameters() < 20e6:
        return "demo"
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 70e9:
        return "gpt2-80gb"
    return "gpt2-12gb"


def main() -> None:
    args = parse()
    from accelerate import Accelerator

    from bridges import choose_tasks

    choose_tasks(args.tasks or ())  # an unknown one is told before anything is loaded
    state = join_processes(args)
    dense = open_dense(args, state.print)
    fill_defaults(args, dense, state.device, state.num_processes)
    if state.is_main_process and args.tasks:
        tell_tasks(args, dense, state.print)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if args.plan or args.preset.startswith("gpt2"):
        accelerator.print(show_plan(args, dense, accelerator))
    if not args.plan:
        run = train_pair(args, dense, accelerator)
        if accelerator.is_main_process:
            prune_circuits(args, run, accelerator.print)
            report(args, run, accelerator.print)
    accelerator.end_training()


def join_processes(args):
    """Meet the other processes of the launch, and share the machine's threads with them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from sparse import check_processes

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(args.processes, state.num_processes)
    share = (os.cpu_count() or 1) // state.num_processes
    torch.set_num_threads(args.threads or max(1, share))  # accelerate launch would leave one
    threads = torch.get_num_threads()
    state.print(f"{state.num_processes} process(es) on {state.device}, {threads} threads each")
    return state


def open_dense(args, say):
    """The dense model, which must have a tokenizer."""
    from dense import DenseModel

    dense = DenseModel.from_pretrained(args.dense)
    say(dense.describe())
    if dense.tokenizer is None:
        raise ValueError(
            f"{args.dense} has no tokenizer; tokenizer.save_pretrained beside the weights"
        )
    return dense


def train_pair(args, dense, accelerator):
    """Co-train the twin and its bridges; the main process saves and returns the run."""
    from bridges import cotrain, save_run

    say = accelerator.print
    sparse, bridges, config = build(args, dense)
    say(f"twin: {sparse.num_parameters():,} parameters, {config.sparsity.density:.4f} kept")
    batches, heldout, means_from, data = read_text(args, dense.tokenizer)
    if len(heldout) < 2:
        raise ValueError(
            f"the held-out text of {data['name']} fills {len(heldout)} block of {args.length} "
            "tokens, and the report's errors need 2; give more text or a smaller --length"
        )
    say(f"text: {data['name']}, tokens for training: {data.get('tokens', 'as they are read')}")
    per_pass = args.batch // (accelerator.num_processes * args.accumulate)
    parts = heldout.split(min(EVALUATED, max(1, per_pass)))
    with perhaps_compiled(args, dense, sparse):
        cotrain(dense, sparse, bridges, batches, config, parts, accelerator)
    if not accelerator.is_main_process:
        return None
    facts = {"data": data, "command": " ".join(["python", *sys.argv]), "arguments": vars(args)}
    kept = dict(heldout=heldout, means_from=means_from, facts=facts)
    return save_run(args.output_dir, dense, sparse, bridges, **kept)


def perhaps_compiled(args, dense, sparse):
    """A context in which both models run compiled, if --compile asks for it."""
    from bridges import compiled

    if args.compile:
        return compiled(dense, sparse)
    return nullcontext()


def show_plan(args, dense, accelerator) -> str:
    """Probe the step on this device; return the plan of the run, or of a run's start one line."""
    from bridges import plan, time_steps
    from sparse import estimated_tokens, load_corpus

    sparse, bridges, config = build(args, dense)  # the probe changes them; training starts anew
    with perhaps_compiled(args, dense, sparse):
        probed = time_steps(dense, sparse, bridges, config, args.batch, args.length, accelerator)
    tokens = 0  # kept on disk
    if args.plan and not args.stream:
        tokens = estimated_tokens(load_corpus(args.dataset), dense.tokenizer, args.length)
    sizes = dict(batch=args.batch, length=args.length, text_tokens=tokens, evaluated=EVALUATED)
    sizes["processes"] = accelerator.num_processes
    planned = plan(dense, sparse, bridges, config, **sizes, step_time=probed)
    return f"{args.preset} for {args.dense}\n{planned}" if args.plan else planned.line()


def read_text(args, tokenizer):
    """Batches, held-out blocks, blocks for the node means, and what to say of the text."""
    from sparse import Batches, StreamingBatches, first_blocks, load_corpus, pack, stream_corpus

    if args.stream:
        batches = StreamingBatches(stream_corpus(args.dataset), tokenizer, args.length, args.batch)
        heldout = first_blocks(stream_corpus(args.dataset), tokenizer, args.length, 64)
        train = first_blocks(stream_corpus(args.dataset), tokenizer, args.length, 256, "train")
        return batches, heldout, train, {"name": args.dataset or "Python's own sources"}
    corpus = load_corpus(args.dataset)
    cache = Path(args.output_dir).parent / "tokens"  # shared by the runs beside each other
    train = pack(corpus.train, tokenizer, args.length, cache=cache)
    heldout = pack(corpus.validation, tokenizer, args.length, cache=cache)[:64]
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint, "tokens": train.numel()}
    return Batches(train, args.batch, args.seed), heldout, train[:256], data


def build(args, dense):
    """The twin, the bridges and their training."""
    import torch

    from bridges import BridgeConfig, BridgeSet, CotrainConfig, LossWeights
    from sparse import SparseGPT, SparseGPTConfig, SparsityConfig, TrainConfig, prefix_ids

    prefix = prefix_ids(dense.tokenizer)
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
            bos_token_id=prefix[0] if len(prefix) == 1 else None,  # where a generation begins
            eos_token_id=dense.tokenizer.eos_token_id,
        )
    )
    config = CotrainConfig(
        train=TrainConfig(
            steps=args.steps,
            folder=args.output_dir,
            seed=args.seed,
            evaluate_every=max(1, args.steps // 10),
            checkpoint_every=max(1, min(max(100, args.steps // 60), args.steps // 5)),
            accumulate=args.accumulate,
            mixed_precision=args.mixed_precision,
            processes=args.processes,
            shard=args.shard,
        ),
        sparsity=SparsityConfig(density=args.density, embedding_density=min(1.0, 4 * args.density)),
        weights=LossWeights(hybrid=args.hybrid_weight),
        lr=args.lr,
        bridge_lr=args.bridge_lr,
    )
    config.sparsity.check(sparse)
    shape = BridgeConfig.between(
        dense, sparse, k=max(1, round(args.encoder_k * width)), sites=args.sites
    )
    return sparse, BridgeSet(shape, seed=args.seed), config


def tell_tasks(args, dense, say) -> None:
    """Say before anything is trained what the dense model does of the tasks."""
    from bridges import choose_tasks
    from sparse import task_table

    table = task_table(dense, tasks=choose_tasks(args.tasks))
    say(f"what the dense model does of the tasks:\n{table.brief()}")
    if not table.does() and not args.force:
        say("it does none of them, so no circuit will be pruned; --force prunes anyway")


def prune_circuits(args, run, say) -> None:
    """Prune a circuit for every task that both models do, and one for its nonsense twin."""
    from bridges import choose_tasks, find_circuits
    from sparse import PruneConfig

    config = PruneConfig(n_steps=args.prune_steps, seed=args.seed)
    find_circuits(run, choose_tasks(args.tasks), config, force=args.force, say=say)


def report(args, run, say) -> None:
    """Test everything beside its controls, print the table and what to do next."""
    from evals import evaluate_run, table, write_report

    quick, kept = args.preset == "smoke", run.output / "evaluated"
    result = evaluate_run(run, seed=args.seed, quick=quick, cache=kept, progress=True)
    paths = write_report(run, result)
    say(table(result))
    say("\nwrote " + "\n      ".join(str(path) for path in paths))
    again = f"python -m evals {run.folder}"
    if args.preset == "smoke":
        again += " --quick"
    if args.seed != 0:
        again += f" --seed {args.seed}"
    next_ = [
        f"open {paths[-1]} in a browser",
        f"{again}    the same report again",
        f"python examples/find_circuit.py {run.folder} --task FILE.jsonl    your own task",
    ]
    if run.circuits():
        next_ += [f"python examples/map_to_dense.py {run.folder}    edit the dense model yourself"]
    say("\n  ".join(["next:", *next_]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; start the same command again to resume")
