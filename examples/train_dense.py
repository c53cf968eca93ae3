"""Train the built-in dense model: a byte-level BPE and a small GPT-2 on Python's standard library.

    python examples/train_dense.py --output_dir runs/tiny           about 20 minutes on one core
    python examples/train_dense.py --output_dir runs/smoke --smoke  ten seconds

It writes a Hugging Face folder (config, safetensors, tokenizer) with a card: README.md, card.json.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

END_OF_TEXT = "<|endoftext|>"
N_TOKENS = 2_048  # entries of the tokenizer; the last is the end-of-text token
SPLIT = (  # a newline or spaces at the end of punctuation stay with it, so `]` + newline can exist
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Recipe:
    """What decides the numbers, apart from steps and seed."""

    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 8
    n_positions: int = 256
    length: int = 256  # tokens in a training block
    batch_size: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 200  # steps
    clip: float = 1.0  # gradient norm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder to write")
    add("--dataset", help="text file, folder or dataset (default: the standard library)")
    add("--tokenizer", help="folder of a tokenizer to keep (default: train one)")
    add("--steps", type=int, default=6_600, help="optimizer steps of 8 x 256 tokens")
    add("--seed", type=int, default=0)
    add("--save_at", type=int, default=0, help="write the folder after so many steps as well")
    add("--smoke", action="store_true", help="a few documents and steps, to see that it runs")
    return parser.parse_args()


def train_tokenizer(texts):
    """Return a byte-level BPE of `N_TOKENS` entries that gives every string back unchanged."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    bpe.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=Recipe.n_positions,
    )


def lr_at(step, steps, recipe):
    """Rise linearly for `warmup` steps, then follow half a cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * warm * (0.505 + 0.495 * math.cos(math.pi * step / steps))


def cross_entropy(model, ids):
    """Return the mean next-token cross-entropy of a batch, nats per predicted token."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids).logits  # batch pos vocab
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, batches, steps, recipe, each_step):
    """Minimise the next-token cross-entropy (nats per token) with AdamW."""
    import torch
    from tqdm import trange

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    for step in (bar := trange(steps, desc="dense", mininterval=1)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, recipe)
        ids = batches.at(step)
        loss = cross_entropy(model, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(nats_per_token=f"{loss.item():.3f}")
        each_step(step + 1)


def validate(model, blocks):
    """Return the mean cross-entropy over all predicted positions, nats per token."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [cross_entropy(model, part) * len(part) for part in blocks.split(16)]
    model.train()
    return (sum(losses) / len(blocks)).item()


def write(folder, model, tokenizer, card):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {key} | {value} |" for key, value in card.items())
    (folder / "README.md").write_text(
        "# The built-in dense model\n\n"
        "A small GPT-2 with its own byte-level BPE, trained on source code by\n"
        "`examples/train_dense.py`. It is meant for trying the library out, offline, on a CPU.\n"
        "The command below gives these bytes again with the same Python, torch and one thread\n"
        "(checked for the first 1,000 steps). The sources of another Python version differ a\n"
        "little: the loss should then agree within 0.1 nats per token, which nobody has measured.\n"
        "\n"
        f"| | |\n|---|---|\n{rows}\n",
        encoding="utf-8",
    )


def build(recipe, tokenizer):
    """The untrained model. It begins a text as the tokenizer does, or with the end of another."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from sparse import prefix_ids

    prefix = prefix_ids(tokenizer)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=recipe.n_layer,
            n_embd=recipe.n_embd,
            n_head=recipe.n_head,
            n_positions=recipe.n_positions,
            bos_token_id=prefix[0] if len(prefix) == 1 else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def read_text(args):
    """The corpus, and its documents to train on and to validate on."""
    from sparse import load_corpus

    corpus = load_corpus(args.dataset)
    documents, held_out = corpus.train, corpus.validation
    if args.smoke:
        documents, held_out = documents[:60], held_out[:4]
    print(f"{corpus.name}: {len(documents)} documents to train on, {len(held_out)} to validate")
    return corpus, documents, held_out


def tokenizer_of(args, documents):
    """The tokenizer that was given, or one trained on the documents."""
    from transformers import AutoTokenizer

    if args.tokenizer:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    return train_tokenizer(documents)


def tokens_per_byte(tokenizer, texts) -> float:
    """Tokens of the texts over their bytes in UTF-8; special tokens are not counted."""
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    n_tokens = sum(len(ids) for ids in tokens)
    return n_tokens / sum(len(text.encode()) for text in texts)


def command(args) -> str:
    """The command that makes this model again."""
    words = f"python examples/train_dense.py --steps {args.steps} --seed {args.seed}"
    words += " --output_dir OUT"
    if args.smoke:
        words += " --smoke"
    return words


def main() -> None:
    args = parse_args()
    import torch

    from sparse import Batches, pack

    recipe = Recipe()
    steps = min(args.steps, 20) if args.smoke else args.steps
    args.output_dir.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    torch.manual_seed(args.seed)
    corpus, documents, held_out = read_text(args)
    tokenizer = tokenizer_of(args, documents)
    validation = pack(held_out, tokenizer, recipe.length)
    batches = Batches(pack(documents, tokenizer, recipe.length), recipe.batch_size, args.seed)
    model = build(recipe, tokenizer)
    per_byte = tokens_per_byte(tokenizer, held_out)
    start = time.perf_counter()

    def save(step):
        nats = validate(model, validation)
        card = {
            "corpus": corpus.name,
            "corpus_fingerprint": corpus.fingerprint,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": model.num_parameters(),
            "command": command(args),
            "seed": args.seed,
            "steps": f"{step} of {steps}",
            "tokens_seen": step * recipe.batch_size * recipe.length,
            "training_tokens": batches.blocks.numel(),
            "validation_tokens": validation.numel(),
            "validation_nats_per_token": round(nats, 4),
            "validation_nats_per_byte": round(nats * per_byte, 4),
            "seconds": round(time.perf_counter() - start),
        }
        write(args.output_dir, model, tokenizer, card)
        print(f"step {step}: validation {nats:.3f} nats per token; wrote {args.output_dir}")

    def each_step(step):
        if step == args.save_at:
            save(step)

    train(model, batches, steps, recipe, each_step)
    save(steps)
    print(f"next: python examples/train_bridge.py --dense {args.output_dir} --output_dir runs/one")


if __name__ == "__main__":
    main()
