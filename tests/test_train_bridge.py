"""The main job's plan, presets and streamed text; tests/test_examples.py runs it whole."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bridges import PRESETS, Preset, StepTime, cotrain, plan, planned, read_text, with_flags
from dense import DenseModel, tiny
from dense.opening.load import TINY
from sparse import StreamingBatches, first_blocks, load_corpus, pack, stream_corpus

SCRIPT = str(Path(__file__).resolve().parents[1] / "examples" / "train_bridge.py")
CARDS = {"gpt2-80gb": 80e9, "gpt2-12gb": 12e9}  # bytes


@pytest.fixture
def job(monkeypatch):
    """`job(*flags)`: the names of the script, and what its flags say."""

    def open_(*flags):
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["train_bridge.py", *flags])
        names = SimpleNamespace(**runpy.run_path(SCRIPT))
        return names, names.parse()

    return open_


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like GPT-2's: config, weights and tokenizer."""
    path = tmp_path_factory.mktemp("a model") / "small-gpt2"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ends = dict(bos_token_id=0, eos_token_id=0)
    shape = dict(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(GPT2Config(**shape, **ends)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_text(folder):
    rows = [json.dumps({"text": f"def f_{i}(x):\n    return 'x' * {i}\n" * 9}) for i in range(99)]
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.jsonl").write_text("\n".join(rows[33 * i : 33 * i + 33]))


@pytest.mark.parametrize("extra", [(), ("--stream", "--accumulate", "2")])
def test_a_plan_is_printed_and_nothing_is_written(extra, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    before = sorted(tmp_path.rglob("*")), sorted(folder.rglob("*"))
    flags = ["--dense", str(folder), "--dataset", "text", "--output_dir", "runs/new", "--plan"]
    flags += ["--steps", "12", "--batch", "4", "--length", "16", "--threads", "1", *extra]
    monkeypatch.setattr(sys, "argv", ["train_bridge.py", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(SCRIPT, run_name="__main__")  # a return is exit code 0
    said = capsys.readouterr().out
    assert (sorted(tmp_path.rglob("*")), sorted(folder.rglob("*"))) == before
    n = sum(p.numel() for p in GPT2LMHeadModel.from_pretrained(folder).parameters())
    lines = {line[:38].strip(): line[38:].strip() for line in said.splitlines()}
    assert lines["dense"] == f"{n:,}" and lines["tokens"] == f"{12 * 4 * 16:,}"
    assert float(lines["hours for training and validation"]) > 0
    assert float(lines["GB, resident peak (VmHWM)"]) > 0
    assert f"small for {folder}" in said  # a small model takes no preset of GPT-2's
    assert "outlying tokens" in said
    assert lines["passes per step"] == ("2" if extra else "1")


def full_shape():
    """What the plan and the design read of a GPT-2; its weights have shapes and no contents."""
    return SimpleNamespace(
        name="gpt2",
        model=GPT2LMHeadModel(GPT2Config()),
        tokenizer=AutoTokenizer.from_pretrained(TINY),
        n_layers=12,
        n_sites=25,
        d_resid=768,
        vocab_size=50257,
        **dict.fromkeys(("residuals", "resume", "last_logits", "joined", "unembed"), print),
    )


@pytest.mark.parametrize("name", CARDS)
def test_a_preset_for_gpt2_fits_its_card_and_fills_it(name):
    preset = PRESETS[name]
    with FakeTensorMode():
        dense = full_shape()
        p = plan(dense, *preset.build(dense), preset.batch, preset.length)
    assert not p.unknown
    assert 0.5 * CARDS[name] < p.memory < 0.9 * CARDS[name], p.line()
    assert (p.dense_parameters, p.mixed_precision) == (124_439_808, "bf16")
    assert preset.stream and preset.length <= 1024
    if name == "gpt2-80gb":
        assert p.memory > 2 * CARDS["gpt2-12gb"]  # control: it is no preset for the small card


def test_the_preset_follows_the_model_and_the_memory(monkeypatch):
    dense = full_shape()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Preset.for_model(dense).name == "cpu"
    assert Preset.for_model(tiny()).name == "demo"
    small = SimpleNamespace(**vars(dense) | {"name": "mine"})
    small.model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2))
    assert Preset.for_model(small).name == Preset.for_model(small, 80e9).name == "small"
    found = {gb: Preset.for_model(dense, gb * 1e9) for gb in (6, 12, 80)}
    for gb, preset in found.items():
        assert preset.memory(dense) < 0.9e9 * gb
    assert found[80] == PRESETS["gpt2-80gb"] and found[12].name == "gpt2-12gb"
    assert found[6].accumulate > found[12].accumulate or found[6].expansion < found[12].expansion
    with pytest.raises(ValueError, match="no preset for gpt2 fits into 1 GB: the thinnest needs"):
        Preset.for_model(dense, 1e9)


def test_flags_change_a_preset_and_what_cannot_be_is_refused(job):
    _, args = job("--preset", "gpt2-12gb", "--no-stream", "--accumulate", "2", "--steps", "9")
    preset = with_flags(PRESETS[args.preset], args)
    assert preset == replace(PRESETS["gpt2-12gb"], stream=False, accumulate=2, steps=9)
    with pytest.raises(
        ValueError, match="--batch 32 .* 1 process.* 3 passes; give a multiple of 3"
    ):
        replace(preset, accumulate=3).check(full_shape())
    with pytest.raises(ValueError, match="1024 positions; give --length 1024 or less"):
        replace(preset, length=2000).check(full_shape())


def test_the_main_job_is_two_lines_in_a_notebook():
    dense = tiny()
    twin, bridges, config = Preset.for_model(dense).build(dense, "runs/mine")
    bridges.check(dense, twin)
    assert config.train.folder == "runs/mine" and config.lr == PRESETS["demo"].lr
    again = Preset.for_model(dense).build(dense)
    assert again.sparse.fingerprint() == twin.fingerprint()  # the seed fixes the start
    before = torch.get_rng_state()
    Preset.for_model(dense).build(dense)
    assert torch.equal(torch.get_rng_state(), before)  # and the caller's draws go on


def test_as_many_steps_are_planned_as_fit_into_the_hours(monkeypatch):
    took = StepTime(device="a machine", sequences=2, length=128, seconds=3.0, fixed=1.0)
    monkeypatch.setattr("bridges.presets.planned.time_steps", lambda *_: took)
    whole, of_all = planned(PRESETS["smoke"], tiny(), Accelerator())
    assert whole == PRESETS["smoke"] and of_all.hours() > 6 / 3600
    for hours in (1.0, 3.0):
        preset, found = planned(PRESETS["demo"], tiny(), Accelerator(), hours=hours)
        assert found.steps == preset.steps and 0.96 * hours < found.hours() <= hours
    assert planned(PRESETS["demo"], tiny(), hours=1.0)[0] == PRESETS["demo"]  # nothing is measured


def test_the_hours_of_a_plan_are_met_by_what_it_says(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    flags = ["--dense", str(folder), "--dataset", "text", "--plan", "--hours", "0.01"]
    flags += ["--batch", "4", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["train_bridge.py", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(SCRIPT, run_name="__main__")
    said = capsys.readouterr().out
    lines = {line[:38].strip(): line[38:].strip() for line in said.splitlines()}
    hours = float(lines["hours for training and validation"])
    assert hours <= 0.0105 and lines["optimizer steps"] != "3,000"
    assert float(lines["minutes of pruning a task, at most"]) > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sites 0:0,3", "'0:0,3' is neither even nor D:S,D:S,...; try 0:0,4:2"),
        ("--sites 0:0,0:1", "'0:0,0:1' names a dense site twice"),
        ("--encoder_k 1.5", "--encoder_k 1.5 must be above 0 and at most 1"),
        ("--accumulate 0", "--accumulate 0 must be at least 1"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_with_what_would(flags, words, job, capsys):
    with pytest.raises(SystemExit):
        job(*flags.split())
    assert words in capsys.readouterr().err
    assert job("--sites", "4:2,0:0")[1].sites == {0: 0, 4: 2}  # control


def test_a_streamed_run_reads_what_streaming_batches_promise(tmp_path):
    write_text(tmp_path)
    text, tokenizer = tmp_path / "text", AutoTokenizer.from_pretrained(TINY)
    preset = replace(PRESETS["smoke"], batch=4, length=16, stream=True)
    batches, heldout, train, counts, data = read_text(preset, tokenizer, str(text))
    assert counts is None
    want = StreamingBatches(stream_corpus(text), tokenizer, 16, 4)
    for _, a, b in zip(range(3), batches, want, strict=False):
        assert torch.equal(a, b)
    state = json.loads(json.dumps(batches.state_dict()))
    again = read_text(preset, tokenizer, str(text)).batches
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)), next(iter(want)))
    assert torch.equal(heldout, first_blocks(stream_corpus(text), tokenizer, 16, 64))
    assert torch.equal(train, first_blocks(stream_corpus(text), tokenizer, 16, 256, "train"))
    assert data["name"] == str(text) and "tokens" not in data
    seen = {tuple(row) for row in train.tolist()}
    assert not seen & {tuple(row) for row in heldout.tolist()}


def test_a_streamed_run_cut_in_two_ends_with_the_weights_of_an_undisturbed_one(
    job, folder, tmp_path
):
    write_text(tmp_path)
    dense = DenseModel.from_pretrained(folder)

    def run(name, cut=False):
        flags = ["--dense", str(folder), "--dataset", str(tmp_path / "text"), "--preset", "smoke"]
        flags += ["--stream", "--accumulate", "2", "--density", "0.5"]
        flags += ["--output_dir", str(tmp_path / name)]
        _, args = job(*flags)
        preset = with_flags(PRESETS[args.preset], args)
        sparse, bridges, config = preset.build(dense, args.output_dir)
        text = read_text(preset, dense.tokenizer, args.dataset)
        cotrain(dense, sparse, bridges, text.batches, config)
        if cut:
            shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
        return torch.cat([p.detach().flatten() for p in sparse.parameters()])

    whole = run("whole")
    run("cut", cut=True)
    assert torch.equal(run("cut"), whole)
    log = (tmp_path / "cut" / "log.jsonl").read_text()
    assert log.count('"step": 6') >= 1 and (tmp_path / "cut/checkpoints/step-00000005").is_dir()


def test_what_the_report_will_need_is_asked_for_before_anything_is_trained(
    folder, job, tmp_path, monkeypatch, capsys
):
    (tmp_path / "short").mkdir()
    for i in range(60):
        (tmp_path / "short" / f"{i}.txt").write_text(f"x_{i} = {i}\n")
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit):
        job("--output_dir", str(tmp_path / "a_file" / "run"))
    assert "a_file is a file; name a folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    n = pack(load_corpus("short").validation, AutoTokenizer.from_pretrained(folder), 2).numel()
    flags = ["--dense", str(folder), "--dataset", "short", "--preset", "smoke", "--density", "0.5"]
    flags += ["--length", str(n // 2 + 1), "--expansion", "1", "--output_dir", "run"]
    monkeypatch.setattr(sys, "argv", ["train_bridge.py", *flags])
    with pytest.raises(ValueError, match=f"fills 1 block of {n // 2 + 1} tokens.* need 2"):
        runpy.run_path(SCRIPT)["main"]()
    assert not (tmp_path / "run").exists()


def test_two_processes_are_started_as_the_refusal_of_one_says(folder, tmp_path):
    """Their training is that of one process, which tests/bridges/laws/test_devices.py compares."""
    write_text(tmp_path)
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", SCRIPT]
    command += ["--dense", str(folder), "--dataset", "text", "--density", "0.5", "--length", "16"]
    command += ["--batch", "4", "--processes", "2", "--shard", "--plan"]
    run = dict(cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout and "weights, gathered" in done.stdout
    assert done.stdout.count("sequences per step") == 1, "one process speaks"
