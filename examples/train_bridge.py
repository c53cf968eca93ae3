"""The main job: co-train a weight-sparse twin and its bridges, prune circuits, test them.

    accelerate launch examples/train_bridge.py --dense tiny
    accelerate launch examples/train_bridge.py --dense gpt2 --dataset text/ --plan
    accelerate launch examples/train_bridge.py --dense gpt2 --dataset text/ --output_dir runs/gpt2

Writes a run folder: the twin, the bridges, a circuit per task with its nonsense twin, and a report
of every claim beside its control. Started again with the same settings it resumes. A task that the
dense model or the twin does not do (at most 0.3 nats) is skipped, and the reason is told.

Without --preset, `bridges.Preset.for_model` chooses: demo for tiny, small for other models under
20 M parameters, cpu for larger ones on a CPU, and what fits on a GPU. --plan says what a run would
take and writes nothing. The presets, of which every value has a flag:

"""

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EVALUATED = 16  # held-out sequences scored at a time, at most


def main() -> None:
    args = parse()
    from bridges import choose_tasks

    choose_tasks(args.tasks or ())  # an unknown one is told before anything is loaded
    accelerator, dense, preset = prepare(args)
    if args.plan or preset.stream or args.hours:
        planned, preset = show_plan(args, preset, dense, accelerator)
        accelerator.print(planned)
    if not args.plan:
        if accelerator.is_main_process:
            tell_tasks(preset, dense, accelerator.print)
        run = train_pair(args, preset, dense, accelerator)
        if accelerator.is_main_process:
            prune_circuits(preset, run, accelerator.print)
            report(preset, run, accelerator.print)
    accelerator.end_training()


def prepare(args):
    """Meet the other processes of the launch, open the dense model, choose the preset."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import parse_flag_from_env

    from dense import DenseModel
    from sparse import check_processes

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(args.processes, state.num_processes)
    share = (os.cpu_count() or 1) // state.num_processes
    torch.set_num_threads(args.threads or max(1, share))  # accelerate launch would leave one
    threads = torch.get_num_threads()
    state.print(f"{state.num_processes} process(es) on {state.device}, {threads} threads each")
    dense = DenseModel.from_pretrained(args.dense)
    if dense.tokenizer is None:
        raise ValueError(
            f"{args.dense} has no tokenizer; tokenizer.save_pretrained beside the weights"
        )
    preset = chosen(args, dense, state.num_processes)
    state.print(dense.describe(sample(dense, preset.length)))
    return Accelerator(mixed_precision=preset.mixed_precision), dense, preset


def chosen(args, dense, processes=1):
    """The preset that was named or is the model's, with what the flags change."""
    from bridges import PRESETS, Preset, with_flags

    memory = args.memory * 1e9 if args.memory else None
    preset = PRESETS[args.preset] if args.preset else Preset.for_model(dense, memory)
    preset = with_flags(preset, args)
    preset.check(dense, processes)
    args.output_dir = args.output_dir or f"runs/{Path(args.dense).name}-{preset.name}"
    return preset


def sample(dense, length):
    """A little text of Python's own sources, to look at the dense model."""
    from sparse import first_blocks, stream_corpus

    return first_blocks(stream_corpus(), dense.tokenizer, min(64, length), 8, "train")


def show_plan(args, preset, dense, accelerator):
    """Probe the step; return the plan (of a run's start one line), and the preset that it is of."""
    from bridges import plan, time_steps
    from sparse import estimated_tokens, load_corpus

    tokens = 0  # kept on disk
    if args.plan and not preset.stream:
        tokens = estimated_tokens(load_corpus(args.dataset), dense.tokenizer, preset.length)
    sizes = dict(batch=preset.batch, length=preset.length, text_tokens=tokens, evaluated=EVALUATED)
    sizes["processes"] = accelerator.num_processes
    design = preset.build(dense, args.output_dir, **training(args))  # the probe changes it
    probed = None  # the speed of a GPU that is not here cannot be measured
    if not args.memory:
        with perhaps_compiled(args, dense, design.sparse):
            probed = time_steps(dense, *design, preset.batch, preset.length, accelerator)
    planned = plan(dense, *design, **sizes, step_time=probed)
    if args.hours and (steps := planned.steps_within(args.hours)):
        preset = replace(preset, steps=max(1, steps))
        design = design._replace(config=preset.training(args.output_dir, **training(args)))
        planned = plan(dense, *design, **sizes, step_time=probed)
    title = f"{preset.name} for {args.dense}"
    title += f" (--hours: to resume, give --steps {preset.steps} instead)" if args.hours else ""
    return f"{title}\n{planned}" if args.plan else f"{title}: {planned.line()}", preset


def training(args):
    return dict(processes=args.processes, shard=args.shard, products=args.products)


def perhaps_compiled(args, dense, sparse):
    """A context in which both models run compiled, if --compile asks for it."""
    from bridges import compiled

    return compiled(dense, sparse) if args.compile else nullcontext()


def tell_tasks(preset, dense, say) -> None:
    """Say before anything is trained what the dense model does of the tasks."""
    from bridges import choose_tasks
    from sparse import task_table

    if not preset.tasks:
        return
    table = task_table(dense, tasks=choose_tasks(preset.tasks))
    say(f"what the dense model does of the tasks:\n{table.brief()}")
    if not table.does() and not preset.force:
        say("it does none of them, so no circuit will be pruned; --force prunes anyway")


def train_pair(args, preset, dense, accelerator):
    """Co-train the twin and its bridges; the main process saves and returns the run."""
    from bridges import cotrain, save_run, validation_sequences
    from sparse import with_products

    say, folder = accelerator.print, args.output_dir
    sparse, bridges, config = preset.build(dense, folder, **training(args))
    config = replace(config, train=with_products(config.train))
    say(f"twin: {sparse.num_parameters():,} parameters, {config.sparsity.density:.4f} kept")
    batches, heldout, kept, data = read_text(args, preset, dense.tokenizer)
    if len(heldout) < 2:
        raise ValueError(
            f"the held-out text of {data['name']} fills {len(heldout)} block of {preset.length} "
            "tokens, and the report's errors need 2; give more text or a smaller --length"
        )
    say(f"text: {data['name']}, tokens for training: {data.get('tokens', 'as they are read')}")
    per_pass = preset.batch // (accelerator.num_processes * preset.accumulate)
    n = validation_sequences(config, len(bridges.config.sites), preset.batch)
    parts = heldout[:n].split(min(EVALUATED, max(1, per_pass)))
    with perhaps_compiled(args, dense, sparse):
        cotrain(dense, sparse, bridges, batches, config, parts, accelerator)
    if not accelerator.is_main_process:
        return None
    command = " ".join(["python", *sys.argv])
    facts = {"data": data, "command": command, "arguments": vars(args) | asdict(preset)}
    facts["products"] = config.train.products
    return save_run(folder, dense, sparse, bridges, heldout=heldout, facts=facts, **kept)


def read_text(args, preset, tokenizer):
    """Batches, held-out blocks, what is kept of the training text, and what to say of the text."""
    from sparse import (
        Batches,
        StreamingBatches,
        count_tokens,
        first_blocks,
        load_corpus,
        pack,
        prefix_ids,
        stream_corpus,
    )

    length, batch = preset.length, preset.batch
    if preset.stream:
        batches = StreamingBatches(stream_corpus(args.dataset), tokenizer, length, batch)
        heldout = first_blocks(stream_corpus(args.dataset), tokenizer, length, 64)
        train = first_blocks(stream_corpus(args.dataset), tokenizer, length, 256, "train")
        name = args.dataset or "Python's own sources"
        return batches, heldout, dict(means_from=train), {"name": name}
    corpus = load_corpus(args.dataset)
    cache = Path(args.output_dir).parent / "tokens"  # shared by the runs beside each other
    train = pack(corpus.train, tokenizer, length, cache=cache)
    heldout = pack(corpus.validation, tokenizer, length, cache=cache)[:64]
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint, "tokens": train.numel()}
    counts = count_tokens(train, len(tokenizer), prefix_ids(tokenizer))
    kept = dict(means_from=train[:256], token_counts=counts)
    return Batches(train, batch, preset.seed), heldout, kept, data


def prune_circuits(preset, run, say) -> None:
    """Prune a circuit for every task that both models do, and one for its nonsense twin."""
    from bridges import choose_tasks, find_circuits
    from sparse import PruneConfig

    config = PruneConfig(n_steps=preset.prune_steps, seed=preset.seed)
    find_circuits(run, choose_tasks(preset.tasks), config, force=preset.force, say=say)


def report(preset, run, say) -> None:
    """Test everything beside its controls, print the table and what to do next."""
    from evals import evaluate_run, table, write_report

    quick, kept = preset.name == "smoke", run.output / "evaluated"
    result = evaluate_run(run, seed=preset.seed, quick=quick, cache=kept, progress=True)
    paths = write_report(run, result)
    say(table(result))
    say("\nwrote " + "\n      ".join(str(path) for path in paths))
    again = f"python -m evals {run.folder}" + (" --quick" if quick else "")
    again += f" --seed {preset.seed}" if preset.seed else ""
    next_ = [
        f"open {paths[-1]} in a browser",
        f"{again}    the same report again",
        f"python examples/find_circuit.py {run.folder} --task FILE.jsonl    your own task",
    ]
    if run.circuits():
        next_ += [f"python examples/map_to_dense.py {run.folder}    edit the dense model yourself"]
    say("\n  ".join(["next:", *next_]))


def parse() -> argparse.Namespace:
    """What the command line says; what makes no sense is refused before anything is loaded."""
    from bridges import PRESETS, add_flags, preset_table, with_flags

    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__ + preset_table(), formatter_class=shape)
    p.add_argument("--dense", default="tiny", help="tiny, smollm2, a name on the hub, or a folder")
    p.add_argument("--dataset", help="file, folder or dataset name; default: Python's own sources")
    p.add_argument("--output_dir", help="default: runs/<dense>-<preset>; tokens go beside it")
    p.add_argument("--preset", choices=PRESETS, help="default: chosen for the model, see above")
    p.add_argument("--plan", action="store_true", help="say what the run would take, and stop")
    p.add_argument("--memory", type=float, help="GB of a GPU to choose for; default: this device")
    p.add_argument("--hours", type=float, help="take as many steps as fit into so many hours")
    p.add_argument("--compile", action="store_true", help="torch.compile both models' sublayers")
    p.add_argument("--threads", type=int, help="CPU threads per process; default: its share")
    p.add_argument("--processes", type=int, help="refuse to train on another number of processes")
    p.add_argument("--shard", action="store_true", help="split the parameters among processes")
    how = "what computes sparse products on a CPU; default: the fastest, or what the run began with"
    p.add_argument("--products", choices=("scipy", "mkl", "dense"), help=how)
    add_flags(p)
    args = p.parse_args()
    try:
        with_flags(PRESETS[args.preset or "small"], args)
    except ValueError as error:
        p.error(str(error))
    for name, least in {"memory": 0, "hours": 0, "threads": 1, "processes": 1}.items():
        value = getattr(args, name)
        if value is not None and (value < least or value == 0):
            p.error(f"--{name} {value} must be {'at least 1' if least else 'above 0'}")
    for path in (Path(args.output_dir or "."), *Path(args.output_dir or ".").parents):
        if path.is_file():
            p.error(
                f"--output_dir {args.output_dir}: {path} is a file; name a folder, or a new one"
            )
    return args


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; start the same command again to resume")
