"""Can my model do it? The loss of a model on tasks, beside chance; and of a run's twin.

    python examples/check_task.py tiny
    python examples/check_task.py gpt2 while_return_true pronoun my.jsonl
    python examples/check_task.py runs/tiny-demo single_double_quote:distractors

MODEL is a Hugging Face name or folder, or a run folder, whose dense model and twin are both asked;
"tiny" is the built-in run. Without TASK all built-in tasks are asked.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    p.add_argument("model", metavar="MODEL")
    p.add_argument("tasks", metavar="TASK", nargs="*", help="default: all built-in tasks")
    p.add_argument("--split", choices=["train", "validation", "test"], default="validation")
    p.add_argument("--groups", action="store_true", help="show the loss by frame and word, too")
    args = p.parse_args()

    from bridges import choose_tasks, load_run
    from dense import DenseModel
    from sparse import task_table

    tasks = choose_tasks(args.tasks or ["all"])
    if args.model == "tiny" or (Path(args.model) / "manifest.json").is_file():
        run = load_run(args.model)
        models, tokenizer = {"dense model": run.dense, "twin": run.sparse}, run.tokenizer
    else:
        models = {"dense model": DenseModel.from_pretrained(args.model)}
        tokenizer = models["dense model"].tokenizer
    for name, model in models.items():
        table = task_table(model, tokenizer, tasks, split=args.split, progress=True)
        print(f"{name}\n{table.rows()}\n")
        if args.groups:
            for score in table.scores:
                for factor, levels in score.nats_by.items():
                    for level, nats in sorted(levels.items(), key=lambda item: -item[1]):
                        n = score.n_by[factor][level]
                        print(f"  {score.task}  {factor}  {nats:.3f}  {n:3} pairs  {level!r}")
    print("\n".join(table.reasons()))  # of the tokenizer, so the same for both


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend, said without a traceback
        sys.exit(f"error: {error}")
