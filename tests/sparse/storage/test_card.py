import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel

from sparse.model.config import SparseGPTConfig
from sparse.model.gpt import SparseGPT
from sparse.storage.card import OURS, Card, Metric, markdown
from tests.helpers.processes import environment

METRIC = dict(
    name="validation loss, mean over 4,096 tokens",
    value=3.25,
    unit="nats per token",
    control="unigram model",
    control_value=6.5,
)
FACTS = dict(
    command="python examples/train_sparse.py --seed 3 | tee log",
    data="text.txt, first half",
    tokens=2_048_000,
    steps=500,
    seed=3,
    license="apache-2.0",
    notes="Trained on a laptop.",
)


def card(**changes):
    return Card(**(dict(FACTS, metrics=(Metric(**METRIC),)) | changes))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SparseGPT(SparseGPTConfig(vocab_size=40, hidden_size=24, head_dim=8)).eval()
    with torch.no_grad():
        model.model.wte.weight.fill_(0)
        model.model.wte.weight[:3, 0] = torch.tensor([1.0, -2.0, -0.0])
    return model


def readme(folder):
    return (folder / "README.md").read_text()


def row(text, first):
    """The cells of the table row that begins with `first`."""
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_card_is_the_same_after_json_and_after_a_folder(model, tmp_path):
    made = card(fingerprint=model.fingerprint(), twin_of="gpt2", metrics=(Metric(**METRIC),) * 2)
    assert Card.from_json(made.to_json()) == made
    assert Card.from_json(card(metrics=()).to_json()) == card(metrics=())
    model.card = made
    model.save_pretrained(tmp_path)
    assert SparseGPT.from_pretrained(tmp_path).card == made
    again, info = SparseGPT.from_pretrained(tmp_path, output_loading_info=True)
    assert again.card == made and not any(info.values())
    again.save_pretrained(tmp_path / "b")
    assert readme(tmp_path / "b") == readme(tmp_path)


def test_a_folder_without_a_card_has_none_also_where_one_was(model, tmp_path):
    model.card = card()
    model.save_pretrained(tmp_path)
    model.card = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "card.json").exists()
    assert SparseGPT.from_pretrained(tmp_path).card is None
    assert "Nothing was measured" in readme(tmp_path) and "unigram" not in readme(tmp_path)
    assert "not recorded how this model was made" in readme(tmp_path)


def test_no_number_is_written_without_its_control():
    for name in ("control", "control_value", "unit"):
        with pytest.raises(TypeError, match=name):
            Metric(**{k: v for k, v in METRIC.items() if k != name})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number; measure the control too"):
            Metric(**(METRIC | {"control_value": bad}))
    for bad in (None, True, "6.5"):  # the suite's type checker may speak first
        with pytest.raises((ValueError, TypeError)):
            Metric(**(METRIC | {"control_value": bad}))
    for name in ("name", "unit", "control"):
        with pytest.raises(ValueError, match=f"Metric.{name}=' ' must say something"):
            Metric(**(METRIC | {name: " "}))
    for bad in (({"loss": 3.0},), (3.0,), [Metric(**METRIC)]):
        with pytest.raises((ValueError, TypeError)):
            card(metrics=bad)


def test_a_card_says_how_the_model_was_made():
    for bad in (dict(command=""), dict(data=" "), dict(license="")):
        with pytest.raises(ValueError, match=f"Card.{next(iter(bad))}=.* must say something"):
            card(**bad)
    for bad in (dict(tokens=-1), dict(steps=-1), dict(seed=True)):
        with pytest.raises(ValueError, match=f"Card.{next(iter(bad))}=.* an integer, at least 0"):
            card(**bad)
    with pytest.raises(TypeError, match="seed"):
        Card(**{k: v for k, v in FACTS.items() if k != "seed"})


def test_a_card_file_that_is_none_is_refused_by_name(model, tmp_path):
    model.card = card()
    model.save_pretrained(tmp_path)
    path = tmp_path / "card.json"
    good = json.loads(path.read_text())
    bare = good | {"metrics": [{"name": "loss", "value": 3.0}]}
    broken = ("{", "[]", "3", json.dumps(good | {"speed": 1}), json.dumps(bare))
    broken += (json.dumps(good | {"schema_version": 9}), json.dumps(good | {"metrics": 3}))
    for text in broken:
        path.write_text(text)
        with pytest.raises(ValueError, match="card.json is no model card: .*; restore it or delet"):
            SparseGPT.from_pretrained(tmp_path)
    path.write_text(json.dumps(good))  # control
    assert SparseGPT.from_pretrained(tmp_path).card == card()


def test_the_readme_has_metadata_that_the_hub_reads(model):
    content = ModelCard(card().to_markdown(model, tags=("mine", "sparse_gpt")))
    content.data.to_yaml()
    data = content.data.to_dict()
    assert data.pop("tags") == [
        "sparse-bridges",
        "sparse_gpt",
        "weight-sparse",
        "interpretability",
        "mine",
    ]
    assert data == {
        "library_name": "sparse-bridges",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }  # no model-index: it would show numbers without their controls
    assert ModelCard(markdown(model, None)).data.license == "unknown"
    again = ModelCard(str(content))  # what the Hub's tools write back
    assert again.data.to_dict() == content.data.to_dict() and OURS in again.text


def test_counts_and_densities_are_of_the_weights_themselves(model):
    text = card().to_markdown(model)
    for name, p in model.state_dict().items():
        n, kept = p.numel(), int((p != 0).sum())
        assert row(text, name)[2:4] == [f"{kept:,}", f"{n:,}"], name
        assert abs(float(row(text, name)[4][:-1]) / 100 - kept / n) < 1e-6
    assert row(text, "model.wte.weight") == ["model.wte.weight", "40x24", "2", "960", "0.2083%"]
    n = sum(p.numel() for p in model.parameters())
    kept = sum(int((p != 0).sum()) for p in model.parameters())
    assert f"of whose {n:,} weights {kept:,} are not zero" in " ".join(text.split())
    assert row(text, "hidden_size") == ["hidden_size", "24"] and "float32" in text
    model.half()
    assert "float16" in card().to_markdown(model)


def test_every_fact_and_every_control_is_in_the_text(model):
    text = card(metrics=(Metric(**(METRIC | {"name": "a|b\nc"})),)).to_markdown(model)
    assert row(text, r"a\|b c") == [r"a\|b c", "3.25", "nats per token", "unigram model", "6.5"]
    assert f"```bash\n{FACTS['command']}\n```" in text
    assert row(text, "training tokens")[1] == "2,048,000" and row(text, "seed")[1] == "3"
    assert text.rstrip().endswith(FACTS["notes"]) and "sparse twin of" not in text
    assert row(card(twin_of="gpt2").to_markdown(model), "sparse twin of")[1] == "gpt2"
    fenced = card(command="echo ```` > x").to_markdown(model)
    assert "`````bash\necho ```` > x\n`````" in fenced


def test_numbers_measured_on_other_weights_say_so(model):
    made = card(fingerprint=model.fingerprint())
    assert "Measured on the weights in this folder" in made.to_markdown(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert f"other weights**: their fingerprint is `{made.fingerprint}`" in made.to_markdown(model)
    assert "was not recorded" in card().to_markdown(model)


def test_the_readme_says_how_the_weights_are_stored(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "every tensor as it is" in readme(tmp_path)
    model.save_pretrained(tmp_path, sparse=True)
    assert "as indices and values" in readme(tmp_path)
    given = {n: torch.zeros_like(p) for n, p in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    assert row(readme(tmp_path), "lm_head.weight")[2] == "0"  # the weights that were saved


def test_a_readme_that_somebody_else_wrote_is_left_alone(model, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    model.card = card()
    model.save_pretrained(tmp_path)
    assert readme(tmp_path) == "# My project\n"
    assert SparseGPT.from_pretrained(tmp_path).card == card()
    (tmp_path / "README.md").unlink()
    model.save_pretrained(tmp_path)
    assert OURS in readme(tmp_path)


def test_a_stranger_loads_it_with_the_lines_of_the_readme(model, tmp_path):
    code = "import sys\n"
    for sparse in (False, True):
        folder = tmp_path / f"somebody's model {sparse}"
        model.save_pretrained(folder, sparse=sparse)
        (lines,) = re.findall(r"```python\n(.*?)```", readme(folder), flags=re.S)
        lines = lines.replace("path/to/this/folder", str(folder))
        assert str(folder) in lines and "import sparse " in lines
        if not sparse:  # control: without the import it is not known
            without = lines.replace("import sparse ", "pass ")
            code += f"try:\n    exec({without!r})\nexcept ValueError as error:\n"
            code += "    assert 'sparse_gpt' in str(error) and 'sparse' not in sys.modules\n"
            code += "else:\n    raise SystemExit('known without the import')\n"
        code += lines + "print(type(model).__name__, model.fingerprint())\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["SparseGPT", model.fingerprint()] * 2, done.stderr


class Hub:
    """The Hub as far as an upload sees it."""

    def __init__(self, monkeypatch):
        self.calls, self.files = [], {}
        for name in ("create_repo", "create_branch", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self.taker(name))

    def taker(self, name):
        def take(api, *args, **kwargs):
            self.calls.append((name, api.token, args, kwargs))
            if name == "upload_folder":
                folder = Path(kwargs["folder_path"])
                self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
                return "https://hub/commit/1"
            return SimpleNamespace(repo_id=f"me/{args[0].split('/')[-1]}")

        return take


@pytest.mark.parametrize("sparse", [False, True])
def test_an_upload_is_what_a_save_writes_with_our_card(model, tmp_path, monkeypatch, sparse):
    hub = Hub(monkeypatch)
    model.card = card(fingerprint=model.fingerprint())
    model.save_pretrained(tmp_path / "m", sparse=sparse)
    source = model.source
    address = model.push_to_hub("twin", tags=["mine"], sparse=sparse, token="t", private=True)
    assert address == "https://hub/commit/1" and model.source == source
    assert [name for name, *_ in hub.calls] == ["create_repo", "upload_folder"]
    assert all(token == "t" for _, token, *_ in hub.calls) and hub.calls[0][3]["private"]
    assert hub.calls[1][3]["repo_id"] == "me/twin"
    local = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    assert (
        set(hub.files)
        == set(local)
        == {
            "README.md",
            "card.json",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
    )
    differing = {name for name in local if local[name] != hub.files[name]}
    assert differing == {"README.md"}  # it knows its address and tags
    text = hub.files["README.md"].decode()
    assert 'from_pretrained("me/twin")' in text and "- mine" in text
    assert row(text, METRIC["name"])[1] == "3.25" and "automatically generated" not in text
    assert ("as indices and values" in text) == sparse
    (tmp_path / "down").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "down" / name).write_bytes(content)
    again = SparseGPT.from_pretrained(tmp_path / "down")
    assert again.fingerprint() == model.fingerprint() and again.card == model.card


def test_an_upload_without_a_card_says_that_nothing_was_measured(model, monkeypatch):
    hub = Hub(monkeypatch)
    model.push_to_hub("me/twin", revision="try", max_shard_size="50KB")
    assert [name for name, *_ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[1][3]["branch"] == hub.calls[2][3]["revision"] == "try"
    assert "model.safetensors.index.json" in hub.files and "card.json" not in hub.files
    assert "Nothing was measured" in hub.files["README.md"].decode()
    assert model.source is None


def test_saving_may_upload_at_once(model, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    model.card = card()
    model.save_pretrained(tmp_path / "m", sparse=True, push_to_hub=True, commit_message="hello")
    assert hub.calls[0][2] == ("m",) and hub.calls[1][3]["commit_message"] == "hello"
    assert hub.files["card.json"] == (tmp_path / "m" / "card.json").read_bytes()
    assert hub.files["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert str(tmp_path / "m") == model.source.folder
    hub.calls.clear()
    model.save_pretrained(tmp_path / "m", repo_id="me/other")  # a name alone uploads nothing
    assert not hub.calls


def test_the_trunk_alone_is_saved_and_described_too(model, tmp_path):
    model.card = card(fingerprint=model.fingerprint())
    model.save_pretrained(tmp_path / "whole")
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    assert trunk.card == model.card and trunk.fingerprint() != model.fingerprint()
    trunk.save_pretrained(tmp_path / "trunk", sparse=True)
    text = readme(tmp_path / "trunk")
    assert "AutoModel.from_pretrained" in text and "Measured on other weights" in text
    again = AutoModel.from_pretrained(tmp_path / "trunk")
    assert again.fingerprint() == trunk.fingerprint()


def test_another_class_of_card_is_none():
    made = card()
    assert replace(made, seed=4) == card(seed=4) != made
    with pytest.raises(AttributeError):
        made.seed = 5
