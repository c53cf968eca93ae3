import errno
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse.ops.project import project_
from sparse.storage.checkpoint import read_folder, steps_saved, write_folder
from sparse.text.batches import Batches
from sparse.training import processes
from sparse.training.config import TrainConfig
from sparse.training.groups import Group, scale_, warmup_decay
from sparse.training.loop import fit
from sparse.training.processes import Interrupted
from sparse.training.run_state import RunState

BLOCKS = torch.randint(0, 10, (40, 6), generator=torch.Generator().manual_seed(0))


class Regression(nn.Module):
    """Two groups, two losses, and a target that depends on the step."""

    def __init__(self, scale=1.0, broken_at=None):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 5, generator=rng))
        self.b = nn.Parameter(torch.zeros(5))
        self.u = nn.Parameter(torch.randn(5, generator=rng))
        self.scale, self.broken_at = scale, broken_at

    def forward(self, ids, step):
        y = ids.to(self.w.dtype) / 10 @ self.w + self.b
        if step == self.broken_at:
            y = y / 0
        square = self.scale * (y - torch.arange(5) - 0.1 * step).square().mean()
        return {"square": square, "size": (y.detach() @ self.u).square().mean()}

    def groups(self):
        decayed = frozenset({"w"})
        main = {"w": self.w, "b": self.b}
        lr = dict(lr=lambda t: 0.1 * warmup_decay(t, 12, 0.25))
        return [
            Group(name="main", params=main, decayed=decayed, **lr),
            Group(name="side", params={"u": self.u}, eps=1e-8, betas=(0.8, 0.99), **lr),
        ]


def config(folder, **fields):
    return TrainConfig(**(dict(steps=12, folder=str(folder), log_every=1) | fields))


def batches():
    return Batches(BLOCKS, 8, seed=3)


def train(folder, module=None, after_step=None, **fields):
    module = module or Regression()

    def project(step):
        project_(module.w.data, 9)
        return after_step(step) if after_step else {"kept": 9.0}

    extra = {k: fields.pop(k) for k in ("evaluate", "identity") if k in fields}
    fit(module, batches(), config(folder, **fields), after_step=project, **extra)
    return module


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(x["step"], x["loss/total"], x["loss/square"], x["loss/size"]) for x in log(folder)]


def test_one_step_is_the_specified_sequence_of_operations(tmp_path):
    """docs/method.md#the-training-step, written again: normalise, Adam, project, decay."""
    got = train(tmp_path, steps=7)
    want, source = Regression().double(), batches()
    moments = {name: [0.0, 0.0] for name in ("w", "b", "u")}
    for t in range(7):
        ids = source.at(t)
        want.zero_grad()
        sum(want(ids, t).values()).backward()
        for group in want.groups():
            n = sum(p.numel() for p in group.params.values())
            r = (sum(p.grad.square().sum() for p in group.params.values()) / n) ** 0.5
            for name, p in group.params.items():
                g, (b1, b2) = p.grad / (r + 1e-5), group.betas
                m, v = moments[name]
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                moments[name] = [m, v]
                hat_m, hat_v = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
                p.data -= group.lr(t) * hat_m / (hat_v.sqrt() + group.eps)
        project_(want.w.data, 9)
        want.w.data -= 0.1 * want.groups()[0].lr(t) * want.w.data  # decay, after the projection
    for (name, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5, name
    assert got.w.count_nonzero() == 9


@pytest.mark.parametrize("scale", [1e6, 1.0, 1e-3])
def test_the_pooled_gradient_has_root_mean_square_one_at_any_loss_scale(scale):
    module = Regression(scale=scale)
    params = [module.w, module.b]
    module(BLOCKS, 0)["square"].backward()
    before = [p.grad.clone() for p in params]
    flat = torch.cat([g.flatten() for g in before])
    r = flat.square().mean().sqrt()
    rms = scale_(params, "normalise")
    after = torch.cat([p.grad.flatten() for p in params])
    assert rms.item() == pytest.approx(r.item(), rel=1e-5)
    # one up to the 1e-5 in g / (r + 1e-5), which only gradients of r < 0.1 feel
    assert after.square().mean().sqrt().item() == pytest.approx((r / (r + 1e-5)).item(), rel=1e-5)
    if r > 0.1:
        assert after.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(after, flat / (r + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("scale", [100.0, 1e-3])
def test_clipping_scales_down_only_and_none_leaves_the_gradient(scale):
    module = Regression(scale=scale)
    params = [module.w, module.b]
    for how in ("clip", "none"):
        module.zero_grad()
        module(BLOCKS, 0)["square"].backward()
        before = torch.cat([p.grad.flatten() for p in params])
        r = before.square().mean().sqrt()
        assert scale_(params, how).item() == pytest.approx(r.item(), rel=1e-5)
        after = torch.cat([p.grad.flatten() for p in params])
        want = before / max(r, 1) if how == "clip" else before
        assert torch.allclose(after, want, rtol=1e-5) and (r > 1) == (scale > 1)


def test_normalisation_is_over_the_group_and_not_over_each_tensor():
    module = Regression()
    module(BLOCKS, 0)["square"].backward()
    ratio = module.w.grad.norm() / module.b.grad.norm()
    scale_([module.w, module.b], "normalise")
    assert module.w.grad.norm() / module.b.grad.norm() == pytest.approx(ratio.item(), rel=1e-5)


@pytest.mark.parametrize("stop_at, every", [(1, 1), (5, 3), (7, 3), (11, 12)])
def test_a_run_that_broke_off_and_resumed_is_the_undisturbed_run_bit_for_bit(
    tmp_path, stop_at, every
):
    class PowerCut(Exception):
        pass

    def cut(step):
        if step + 1 == stop_at:
            raise PowerCut

    whole = train(tmp_path / "whole")
    with pytest.raises(PowerCut):
        train(tmp_path / "cut", after_step=cut, checkpoint_every=every)
    saved = steps_saved(tmp_path / "cut" / "checkpoints")
    assert [int(p.name[5:]) for p in saved[-1:]] == [(stop_at - 1) // every * every][: len(saved)]
    again = train(tmp_path / "cut", checkpoint_every=every)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [step for step, *_ in losses(tmp_path / "cut")] == list(range(1, 13))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lost", ["adam/exp_avg", "adam/step", "module/w", "batches"])
def test_control_a_checkpoint_that_lost_anything_shows_in_the_losses(tmp_path, lost):
    train(tmp_path / "whole")
    train(tmp_path / "cut", checkpoint_every=5)
    shutil.rmtree(steps_saved(tmp_path / "cut" / "checkpoints")[-1])
    folder = steps_saved(tmp_path / "cut" / "checkpoints")[-1]
    tensors, state = read_folder(folder, "module", "adam")
    for stem, named in tensors.items():
        for name in [n for n in named if lost.startswith(stem) and n.endswith(lost.split("/")[1])]:
            named[name] = named[name] + 1e-3
    if lost == "batches":
        state["batches"]["step"] += 1
    write_folder(folder, tensors, state)
    train(tmp_path / "cut")
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    n = state["step"]
    assert cut[:n] == whole[:n] and cut[n + 1 :] != whole[n + 1 :]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_the_step_end_and_saves_first(tmp_path, kind):
    before = signal.getsignal(kind)

    def ask(step):
        if step == 4:
            os.kill(os.getpid(), kind)

    train(tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"stopped by {kind.name} after step 5; its state is"):
        train(tmp_path / "cut", after_step=ask)
    assert [p.name for p in steps_saved(tmp_path / "cut" / "checkpoints")] == ["step-00000005"]
    assert signal.getsignal(kind) is before, "the handlers are put back"
    train(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


class Slow(Regression):
    """One step asks the process to stop and then takes very long."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, ids, step):
        if step == self.at:
            linger()
        return super().forward(ids, step)


def linger():
    os.kill(os.getpid(), signal.SIGINT)
    begun = time.monotonic()
    while time.monotonic() - begun < 30:
        time.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.1)


@pytest.mark.parametrize("at", [0, 4, 11])
def test_a_step_that_takes_too_long_is_abandoned_and_taken_anew(tmp_path, impatient, at):
    train(tmp_path / "whole")
    begun = time.monotonic()
    with pytest.raises(Interrupted, match=f"stopped by SIGINT after step {at}; "):
        train(tmp_path / "cut", Slow(at), checkpoint_every=2)
    assert time.monotonic() - begun < 10
    names = [p.name for p in steps_saved(tmp_path / "cut" / "checkpoints")]
    assert names[-1:] == ([f"step-{at:08d}"] if at else [])
    train(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("at", [4, 12])
def test_an_evaluation_that_takes_too_long_is_abandoned_and_made_when_the_run_resumes(
    tmp_path, impatient, at
):
    calls = []

    def evaluate():
        calls.append(1)
        if len(calls) == at // 4 and stopping:
            linger()
        return {"loss": 1.0}

    stopping = False
    train(tmp_path / "whole", evaluate=evaluate, evaluate_every=4)
    calls.clear()
    stopping = True
    with pytest.raises(Interrupted, match=f"stopped by SIGINT after step {at}; its state is"):
        train(tmp_path / "cut", evaluate=evaluate, evaluate_every=4)
    stopping = False
    train(tmp_path / "cut", evaluate=evaluate, evaluate_every=4)
    timeless = [[{k: v for k, v in x.items() if "time" not in k} for x in log(tmp_path / name)]
                for name in ("whole", "cut")]  # fmt: skip
    assert timeless[0] == timeless[1] and sum("val/loss" in x for x in timeless[1]) == 3
    calls.clear()
    train(tmp_path / "cut", evaluate=evaluate, evaluate_every=4)
    assert not calls  # a finished run is not evaluated again


def test_a_finished_run_started_again_does_nothing(tmp_path):
    train(tmp_path)
    before = (tmp_path / "log.jsonl").read_text()

    def never(step):
        raise AssertionError(f"step {step} ran again")

    again = train(tmp_path, after_step=never)
    assert (tmp_path / "log.jsonl").read_text() == before and again.w.count_nonzero() == 9


def test_the_newest_checkpoints_stay_and_older_ones_go(tmp_path):
    train(tmp_path, checkpoint_every=2, keep_checkpoints=3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010", "step-00000012"]


def test_other_settings_are_refused_and_named_and_nothing_is_touched(tmp_path):
    train(tmp_path, identity={"density": 0.1})
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="seed: 0 there, 1 here.*another output folder"):
        train(tmp_path, seed=1, identity={"density": 0.1})
    with pytest.raises(ValueError, match="density: 0.1 there, 0.2 here"):
        train(tmp_path, identity={"density": 0.2})
    with pytest.raises(ValueError, match="density: 0.1 there, None here"):
        train(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == before
    # how often to save is no part of what is computed
    train(tmp_path, checkpoint_every=1, keep_checkpoints=1, identity={"density": 0.1})


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "cut", checkpoint_every=5)
    newest = steps_saved(tmp_path / "cut" / "checkpoints")[-1]
    path = newest / "module.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="module.safetensors cannot be read.*delete it to resume"):
        train(tmp_path / "cut")
    shutil.rmtree(newest)
    train(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before_and_the_run_resumes(
    tmp_path, monkeypatch
):
    import sparse.storage.checkpoint as checkpoint

    def full(tensors, path):
        if "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    train(tmp_path / "whole")
    real = checkpoint.save_file
    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="step-00000008: .*No space left.*free some space"):
            train(tmp_path / "cut", checkpoint_every=4)
    names = [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert names == ["step-00000004"]
    train(tmp_path / "cut", checkpoint_every=4)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_torn_line_of_the_log_is_mended_on_resuming(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "cut", checkpoint_every=5)
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 13, "loss/to')
    newest = steps_saved(tmp_path / "cut" / "checkpoints")[-1]
    newest.rename(newest.with_name(newest.name + ".partial"))  # as a kill while writing leaves it
    train(tmp_path / "cut", checkpoint_every=5)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path, every):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(tmp_path, Regression(broken_at=5), log_every=every, checkpoint_every=2)
    saved = steps_saved(tmp_path / "checkpoints")
    assert [p.name for p in saved] == ["step-00000002", "step-00000004"]


def test_the_log_says_what_was_done(tmp_path):
    train(tmp_path, log_every=5, evaluate=lambda: {"nats": 2.5}, evaluate_every=4)
    lines = log(tmp_path)
    assert [x["step"] for x in lines if "loss/total" in x] == [5, 10, 12]
    assert [x["step"] for x in lines if "val/nats" in x] == [4, 8, 12]
    line = lines[1]
    assert line["loss/total"] == pytest.approx(line["loss/square"] + line["loss/size"])
    lr = 0.1 * warmup_decay(4, 12, 0.25)  # of the step the line tells of, counted from 0
    assert line["lr/main"] == line["lr/side"] == lr
    assert line["grad_rms/main"] > 0 and line["kept"] == 9.0
    assert line["time/tokens_per_second"] > 0


def test_no_evaluation_but_the_last_by_default(tmp_path):
    train(tmp_path, evaluate=lambda: {"nats": 2.5})
    assert [x["step"] for x in log(tmp_path) if "val/nats" in x] == [12]


def test_under_bfloat16_autocast_weights_and_moments_stay_float32(tmp_path):
    seen = []

    class Watched(Regression):
        def forward(self, ids, step):
            on = torch.is_autocast_enabled("cpu")
            seen.append(torch.get_autocast_dtype("cpu") if on else None)
            return super().forward(ids, step)

    AcceleratorState._reset_state(True)
    try:
        module = train(tmp_path, Watched(), mixed_precision="bf16", steps=3)
    finally:
        AcceleratorState._reset_state(True)
    assert seen == [torch.bfloat16] * 3
    assert all(p.dtype == torch.float32 for p in module.parameters())
    saved, _ = read_folder(steps_saved(tmp_path / "checkpoints")[-1], "module", "adam")
    assert {t.dtype for named in saved.values() for t in named.values()} == {torch.float32}


def test_between_lines_of_the_log_the_host_asks_for_no_number(tmp_path):
    """On a GPU every such question waits for the device; here it is an operation to be counted."""

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                asked.append(step)
            return func(*args, **(kwargs or {}))

    asked, step = [], 0

    def count(t):
        nonlocal step
        step = t + 1

    with Asked():
        fit(Regression(), batches(), config(tmp_path, log_every=5), after_step=count)
        assert set(asked) <= {5, 10, 12}
        torch.ones(1).item()  # control: this is one
    assert asked[-1] == 12 and asked


def test_autocast_that_cannot_be_had_is_refused(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'fp16' needs CUDA.*take 'bf16'"):
            train(tmp_path, mixed_precision="fp16")
    with pytest.raises(ValueError, match="'bf16', but the accelerator computes in 'no'"):
        settings = config(tmp_path, mixed_precision="bf16")
        fit(Regression(), batches(), settings, accelerator=Accelerator())
    assert not list(tmp_path.iterdir())


def test_a_batch_that_passes_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8 sequences cannot be shared by 1 .* 3 passes .* of 3"):
        train(tmp_path, accumulate=3)


def test_processes_share_a_batch_evenly_and_without_overlap(tmp_path):
    def rows(rank, world, n=8):
        place = SimpleNamespace(num_processes=world, process_index=rank, device="cpu")
        run = RunState(Regression(), {}, None, batches(), config(tmp_path), Accelerator(), {})
        run.accelerator = place
        return run.share(BLOCKS[:n])

    parts = torch.cat([rows(r, 4) for r in range(4)])
    assert sorted(parts.tolist()) == sorted(BLOCKS[:8].tolist()) and len(rows(0, 4)) == 2
    with pytest.raises(ValueError, match="7 sequences cannot be shared by 4.*multiple of 4"):
        rows(0, 4, n=7)


@pytest.mark.parametrize(
    "fields",
    [
        dict(steps=0),
        dict(log_every=0),
        dict(checkpoint_every=0),
        dict(keep_checkpoints=0),
        dict(accumulate=0),
        dict(evaluate_every=-1),
    ],
)
def test_impossible_settings_are_refused(tmp_path, fields):
    with pytest.raises(ValueError, match=f"TrainConfig.{next(iter(fields))}="):
        config(tmp_path, **fields)
