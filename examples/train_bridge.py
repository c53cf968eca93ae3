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
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    args = parse()
    accelerator, dense, preset = prepare(args)
    if args.plan or preset.stream or args.hours:
        preset = tell_plan(args, preset, dense, accelerator)
    if not args.plan:
        tell_tasks(preset, dense, accelerator)
        run = train_pair(args, preset, dense, accelerator)
        if accelerator.is_main_process:
            prune_circuits(preset, run)
            report(preset, run)
    accelerator.end_training()


def prepare(args):
    """Meet the other processes of the launch, open the dense model, choose the preset."""
    from bridges import PRESETS, Preset, choose_tasks, with_flags
    from dense import DenseModel
    from sparse import first_blocks, launched, stream_corpus

    choose_tasks(args.tasks or ())  # an unknown one is told before anything is loaded
    state = launched(args.processes, args.threads)
    state.print(f"{state.num_processes} process(es) on {state.device}")
    dense = DenseModel.from_pretrained(args.dense)
    dense.to(state.device)
    memory = args.memory * 1e9 if args.memory else None
    preset = PRESETS[args.preset] if args.preset else Preset.for_model(dense, memory)
    preset = with_flags(preset, args)
    preset.check(dense, state.num_processes)
    args.output_dir = args.output_dir or f"runs/{Path(args.dense).name}-{preset.name}"
    some = first_blocks(stream_corpus(), dense.tokenizer, min(64, preset.length), 8, "train")
    state.print(dense.describe(some))
    return preset.accelerator(), dense, preset


def tell_plan(args, preset, dense, accelerator):
    """Say what the run would take, in a line where it starts; return what fits into the hours."""
    from bridges import planned
    from sparse import estimated_tokens, load_corpus

    tokens = 0  # kept on disk
    if args.plan and not preset.stream:
        tokens = estimated_tokens(load_corpus(args.dataset), dense.tokenizer, preset.length)
    how = dict(hours=args.hours, text_tokens=tokens, compile=args.compile, **training(args))
    here = None if args.memory else accelerator  # a GPU that is not here cannot be timed
    preset, plan = planned(preset, dense, here, **how)
    title = f"{preset.name} for {args.dense}"
    title += f" (--hours: to resume, give --steps {preset.steps} instead)" if args.hours else ""
    accelerator.print(f"{title}\n{plan}" if args.plan else f"{title}: {plan.line()}")
    return preset


def training(args):
    names = ("processes", "shard", "products")
    return {"folder": args.output_dir} | {name: getattr(args, name) for name in names}


def tell_tasks(preset, dense, accelerator) -> None:
    """Say before anything is trained what the dense model does of the tasks."""
    from bridges import choose_tasks
    from sparse import task_table

    if not preset.tasks or not accelerator.is_main_process:
        return
    table = task_table(dense, tasks=choose_tasks(preset.tasks))
    print(f"what the dense model does of the tasks:\n{table.brief()}")
    if not table.does() and not preset.force:
        print("it does none of them, so no circuit will be pruned; --force prunes anyway")


def train_pair(args, preset, dense, accelerator):
    """Co-train the twin and its bridges; the main process saves and returns the run."""
    from bridges import compiled, cotrain, read_text, save_run

    say, folder = accelerator.print, Path(args.output_dir)
    design = preset.build(dense, **training(args))
    sparse, bridges, config = design
    kept = design.kept_at_the_end()
    say(f"twin: {sparse.num_parameters():,} parameters, {kept:,} of them kept at the end")
    text = read_text(preset, dense.tokenizer, args.dataset, cache=folder.parent / "tokens")
    tokens = text.facts.get("tokens", "as they are read")
    say(f"text: {text.facts['name']}, tokens for training: {tokens}")
    validation = design.validation(text.heldout, preset.batch, accelerator.num_processes)
    with compiled(dense, sparse) if args.compile else nullcontext():
        cotrain(dense, sparse, bridges, text.batches, config, validation, accelerator)
    if not accelerator.is_main_process:
        return None
    command = " ".join(["python", *sys.argv])
    facts = {"data": text.facts, "command": command, "arguments": vars(args) | asdict(preset)}
    facts["products"] = config.train.products
    return save_run(folder, dense, sparse, bridges, facts=facts, **text.kept())


def prune_circuits(preset, run) -> None:
    """Prune a circuit for every task that both models do, and one for its nonsense twin."""
    from bridges import choose_tasks, find_circuits
    from sparse import PruneConfig

    config = PruneConfig(n_steps=preset.prune_steps, seed=preset.seed)
    find_circuits(run, choose_tasks(preset.tasks), config, force=preset.force)


def report(preset, run) -> None:
    """Test everything beside its controls, print the table and what to do next."""
    from evals import evaluate_run, table, write_report

    quick, kept = preset.name == "smoke", run.output / "evaluated"
    result = evaluate_run(run, seed=preset.seed, quick=quick, cache=kept, progress=True)
    paths = write_report(run, result)
    print(table(result))
    print("\nwrote " + "\n      ".join(str(path) for path in paths))
    again = f"python -m evals {run.folder}" + (" --quick" if quick else "")
    again += f" --seed {preset.seed}" if preset.seed else ""
    next_ = [
        f"open {paths[-1]} in a browser",
        f"{again}    the same report again",
        f"python examples/find_circuit.py {run.folder} --task FILE.jsonl    your own task",
    ]
    if run.circuits():
        next_ += [f"python examples/map_to_dense.py {run.folder}    edit the dense model yourself"]
    print("\n  ".join(["next:", *next_]))


def parse() -> argparse.Namespace:
    """What the command line says; what makes no sense is refused before anything is loaded."""
    from bridges import PRESETS, add_flags, new_folder, positive, preset_table, with_flags

    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__ + preset_table(), formatter_class=shape)
    flag, whole, number = p.add_argument, positive(int), positive(float)
    flag("--dense", default="tiny", help="tiny, smollm2, a name on the hub, or a folder")
    flag("--dataset", help="file, folder or dataset name; default: Python's own sources")
    flag("--output_dir", type=new_folder, help="default: runs/<dense>-<preset>")
    flag("--preset", choices=PRESETS, help="default: chosen for the model, see above")
    flag("--plan", action="store_true", help="say what the run would take, and stop")
    flag("--memory", type=number, help="GB of a GPU to choose for; default: this device")
    flag("--hours", type=number, help="take as many steps as fit into so many hours")
    flag("--compile", action="store_true", help="torch.compile both models' sublayers")
    flag("--threads", type=whole, help="CPU threads per process; default: its share")
    flag("--processes", type=whole, help="refuse to train on another number of processes")
    flag("--shard", action="store_true", help="split the parameters among processes")
    how = "what computes sparse products on a CPU; default: the fastest, or what the run began with"
    flag("--products", choices=("scipy", "mkl", "dense"), help=how)
    add_flags(p)
    args = p.parse_args()
    try:
        with_flags(PRESETS[args.preset or "small"], args)
    except ValueError as error:
        p.error(str(error))
    return args


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; start the same command again to resume")
