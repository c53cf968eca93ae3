import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from bridges.run_folder import load_run, save_run
from bridges.transfer.map_circuit import map_circuit
from dense import DenseModel, model
from sparse.circuits.means import load_means
from sparse.ops.prefix import begin, prefix_ids


@pytest.fixture
def saved(dense, sparse, bridges, ids, tmp_path):
    """A run folder of a dense model that can be opened by name: a folder of its own."""
    dense.model.save_pretrained(tmp_path / "dense")
    dense.tokenizer.save_pretrained(tmp_path / "dense")
    opened = DenseModel.from_pretrained(tmp_path / "dense")
    facts = {"command": "train", "data": {"name": "words"}}
    return save_run(
        tmp_path / "run", opened, sparse, bridges, heldout=ids, means_from=ids, facts=facts
    )


@torch.no_grad()
def test_a_saved_run_opens_as_what_was_saved(saved, dense, sparse, bridges, ids, tmp_path):
    run = load_run(tmp_path / "run")
    assert torch.equal(run.dense.logits(ids), dense.logits(ids))
    assert torch.equal(run.sparse(ids).logits, sparse(ids).logits) and not run.sparse.training
    h, z = dense.residuals(ids)[3], sparse.residuals(ids)[3]
    assert torch.equal(run.bridges.encode(3, h), bridges.encode(3, h))
    assert torch.equal(run.bridges.decode(3, z), bridges.decode(3, z))
    assert torch.equal(run.heldout(), ids)
    text = "A w3 w4 no"
    assert run.tokenizer(text)["input_ids"] == dense.tokenizer(text)["input_ids"]
    assert run.sparse.source.folder == str(tmp_path / "run" / "sparse")
    assert (tmp_path / "run" / "sparse" / "node_means.safetensors").is_file()


def test_the_manifest_says_where_everything_came_from(saved, sparse, tmp_path):
    manifest = saved.manifest
    assert manifest["dense"] == {
        "name": str(tmp_path / "dense"),
        "fingerprint": saved.dense.fingerprint,
    }
    assert manifest["sparse"] == {"fingerprint": sparse.fingerprint()}
    assert manifest["command"] == "train" and manifest["data"] == {"name": "words"}
    assert {"python", "torch", "transformers", "nnsight"} <= set(manifest["versions"])
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        manifest["versions"]["torch"] == torch.__version__
    )


def test_circuits_are_found_by_the_name_of_their_task(saved, circuit_of, task):
    assert saved.circuits() == {}
    circuit_of(saved.sparse).save(saved.circuit_folder(task.name))
    twin = circuit_of(saved.sparse).with_nodes([], "none")
    assert saved.circuit_folder("opening:nonsense").name == "opening-nonsense"
    twin.save(saved.circuit_folder("opening:nonsense"))
    assert list(saved.circuits()) == ["opening"]  # both are of one task here: the name decides
    assert len(saved.circuits()["opening"]) in (0, len(circuit_of(saved.sparse)))


def test_the_log_is_read_back(saved):
    (saved.folder / "log.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n{"step": 2}\n')
    assert saved.log() == [{"step": 1, "loss/total": 2.5}, {"step": 2}]


def test_a_run_that_was_moved_opens_where_it_is(saved, tmp_path):
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    run = load_run(tmp_path / "elsewhere")
    assert run.sparse.source.folder == str(tmp_path / "elsewhere" / "sparse")


def test_another_dense_or_sparse_model_is_refused(saved, build, tmp_path):
    with pytest.raises(ValueError, match="the dense model's weights .* load that dense model"):
        load_run(tmp_path / "run", build.dense(seed=1))
    assert load_run(tmp_path / "run", build.dense(seed=0)).dense is not None  # control: its equal
    build.sparse(seed=5).save_pretrained(tmp_path / "run" / "sparse")
    with pytest.raises(ValueError, match="the sparse model's weights"):
        load_run(tmp_path / "run")


def begun_by(tokenizer, *words):
    """Let the tokenizer put these words before every text."""
    first = [(word, tokenizer.convert_tokens_to_ids(word)) for word in words]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*words, "$A"], special_tokens=first
    )
    return tokenizer


@pytest.fixture
def begun(build, sparse, bridges, ids, tmp_path):
    """A run whose tokenizer puts the word "A" before every text; its folder."""
    build.dense().model.save_pretrained(tmp_path / "dense")
    begun_by(build.dense().tokenizer, "A").save_pretrained(tmp_path / "dense")
    dense, text = DenseModel.from_pretrained(tmp_path / "dense"), begin(ids, [1])
    run = save_run(
        tmp_path / "run", dense, sparse, bridges, heldout=text, means_from=text, facts={}
    )
    assert run.prefix == (1,)
    return run.folder


def without_record(folder):
    """Write the manifest of before prefixes were recorded."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["prefix"]
    path.write_text(json.dumps(manifest))


def test_a_run_records_what_its_tokenizer_puts_before_a_text(begun, tmp_path):
    run = load_run(begun)
    assert run.prefix == prefix_ids(run.tokenizer) == prefix_ids(run.dense.tokenizer) == (1,)
    assert run.manifest["prefix"] == {"ids": [1], "tokens": ["A"]}
    run.export(tmp_path / "copy")
    assert load_run(tmp_path / "copy").prefix == (1,)


def test_a_run_without_a_prefix_says_so_and_one_from_before_they_were_recorded_opens(saved):
    assert saved.prefix == () and saved.manifest["prefix"] == {"ids": [], "tokens": []}
    without_record(saved.folder)
    assert load_run(saved.folder).prefix == ()


def test_blocks_that_do_not_begin_with_the_prefix_are_not_saved(
    build, sparse, bridges, ids, tmp_path
):
    other = DenseModel(build.dense().model, begun_by(build.dense().tokenizer, "A"))
    for wrong in ("heldout", "means_from"):
        texts = dict.fromkeys(("heldout", "means_from"), begin(ids, [1])) | {wrong: begin(ids, [2])}
        with pytest.raises(ValueError, match=rf"save_run: {wrong}: .*puts \[1\] before"):
            save_run(tmp_path / "run", other, sparse, bridges, **texts, facts={})
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_begins_otherwise_than_the_run_is_refused(begun, dense):
    at = begun / "sparse"
    tokenizer = AutoTokenizer.from_pretrained(at)
    for words, says in (((), "nothing"), (("B", "A"), r"\['B', 'A'\]")):
        begun_by(tokenizer, *words).save_pretrained(at)
        with pytest.raises(ValueError, match=rf"puts {says} before .* with \['A'\]; restore the"):
            load_run(begun)
    begun_by(tokenizer, "A").save_pretrained(at)
    with pytest.raises(ValueError, match=r"puts nothing before a text.*take load_run\(.*\).dense"):
        load_run(begun, dense)
    assert load_run(begun, DenseModel(dense.model)).prefix == (1,)  # control: it has no tokenizer
    assert load_run(begun, load_run(begun).dense).prefix == (1,)  # and the remedy


def test_an_old_run_whose_tokenizer_would_begin_a_text_is_refused_and_the_remedy_works(begun):
    without_record(begun)  # so it was trained without
    with pytest.raises(ValueError, match=r"puts \['A'\] .*trained with nothing; tokeni") as refused:
        load_run(begun)
    remedy = str(refused.value).partition("trained with nothing; ")[2].partition(". Or")[0]
    exec(remedy, {"AutoTokenizer": AutoTokenizer})
    run = load_run(begun)
    assert prefix_ids(run.tokenizer) == prefix_ids(run.dense.tokenizer) == run.prefix == ()


def test_a_circuit_is_not_carried_to_a_model_whose_prompts_begin_otherwise(
    begun, circuit_of, dense, tmp_path
):
    run = load_run(begun)
    circuit = circuit_of(run.sparse)
    with pytest.raises(ValueError, match=r"tokenizer of the dense model .*puts nothing before"):
        map_circuit(circuit, dense)
    assert map_circuit(circuit, run.dense).tokenizer is run.dense.tokenizer  # control


def test_a_folder_that_is_no_run_is_refused_with_the_remedy(saved, tmp_path):
    with pytest.raises(ValueError, match="is no run folder: manifest.json is missing; pass the"):
        load_run(tmp_path / "dense")
    path = tmp_path / "run" / "manifest.json"
    whole = path.read_text()
    path.write_text(whole[:-9])
    with pytest.raises(ValueError, match="manifest.json is broken"):
        load_run(tmp_path / "run")
    path.write_text(json.dumps(json.loads(whole) | {"schema_version": 9}))
    with pytest.raises(ValueError, match="schema version 9, this library reads 1"):
        load_run(tmp_path / "run")
    path.write_text(whole)
    shutil.rmtree(tmp_path / "run" / "bridges")
    with pytest.raises(ValueError, match="state.json cannot be read"):
        load_run(tmp_path / "run")


def test_a_dense_model_without_tokenizer_cannot_be_saved(dense, sparse, bridges, ids, tmp_path):
    bare = DenseModel(dense.model)
    with pytest.raises(ValueError, match="no tokenizer.*DenseModel.model, tokenizer"):
        save_run(tmp_path / "run", bare, sparse, bridges, heldout=ids, means_from=ids, facts={})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("manifest.json", b"\xff\xfe", "manifest.json is broken"),
        ("manifest.json", b"[1]", "manifest.json is broken"),
        ("heldout.safetensors", b"", "heldout.safetensors cannot be read"),
        ("log.jsonl", b'{"st\n{"step": 2}\n', "log.jsonl cannot be read"),
        ("bridges/state.json", b"{}", "bridges.safetensors cannot be read: its sha256"),
        ("sparse/model.safetensors", b"half", "a file in .*sparse is broken"),
        ("sparse/tokenizer.json", b'{"ver', "a file in .*sparse is broken"),
        ("sparse/config.json", None, "config.json of .*sparse is missing"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(saved, tmp_path, name, content, says):
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{says}.*; restore"):
        run = load_run(tmp_path / "run", saved.dense)
        run.heldout()
        run.log()


def test_broken_node_means_are_named(saved, tmp_path):
    path = tmp_path / "run" / "sparse" / "node_means.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="node_means.safetensors is broken .*; make it again"):
        load_means(path.parent)


def test_a_last_line_torn_by_a_kill_is_left_out_of_the_log(saved, tmp_path):
    (tmp_path / "run" / "log.jsonl").write_bytes(b'{"step": 1}\n{"st')
    assert load_run(tmp_path / "run").log() == [{"step": 1}]


@torch.no_grad()
def test_an_exported_run_opens_as_the_run_itself(saved, circuit_of, task, ids, tmp_path):
    circuit = circuit_of(saved.sparse)
    circuit.save(saved.circuit_folder(task.name))
    before = saved.sparse.source
    saved.export(tmp_path / "copy")
    assert saved.sparse.source == before
    shutil.rmtree(tmp_path / "run")  # the copy needs nothing of the original
    copy = load_run(tmp_path / "copy")
    assert copy.sparse.fingerprint() == saved.sparse.fingerprint()
    z = saved.sparse.residuals(ids)[3]
    assert torch.equal(copy.bridges.decode(3, z), saved.bridges.decode(3, z))
    assert torch.equal(copy.heldout(), ids) and copy.manifest == saved.manifest
    (mine,) = copy.circuits().values()
    assert mine.nodes == circuit.nodes and mine.source.folder == str(tmp_path / "copy" / "sparse")


def test_the_built_in_run_opens_and_is_only_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = load_run("tiny", "tiny")  # the dense model by its name
    assert repr(run).endswith("dense 'tiny', bridges at 5 sites)")
    circuit = run.circuits()["single_double_quote"]
    assert circuit.met and len(circuit) < 100
    mapped = map_circuit(circuit, run.dense)  # its bridges are found beside it
    batch = circuit.task.batch(run.tokenizer, "test").take(torch.arange(20))
    steered = mapped.steer(batch.ids, batch.counterfactual())
    row = torch.arange(40)
    logits = [y[row, batch.last] for y in (run.dense.logits(batch.ids), steered)]
    other = [(y[row, batch.foil] - y[row, batch.target]).sigmoid().mean() for y in logits]
    assert other[0] < 0.15 < 0.4 < other[1]  # the dense model, and the dense model steered
    fewer = circuit.with_nodes(list(circuit)[:5], "five of them")
    fewer.save(run.circuit_folder("single_double_quote"))
    assert (tmp_path / "runs/tiny/circuits/single_double_quote/circuit.json").is_file()
    assert len(load_run("tiny").circuits()["single_double_quote"]) == 5


def test_counts_of_a_smaller_tokenizer_fit_a_model_with_more_rows(tmp_path):
    run = load_run("tiny")
    blocks, vocab = run.heldout()[:4], run.dense.vocab_size
    counts = torch.arange(vocab - 5)
    text = dict(heldout=blocks, means_from=blocks, facts={})
    saved = save_run(tmp_path, run.dense, run.sparse, run.bridges, **text, token_counts=counts)
    found = saved.token_counts()
    assert torch.equal(found[:-5], counts) and (found[-5:] == 0).all() and len(found) == vocab
    with pytest.raises(ValueError, match=f"token_counts has {vocab + 1} tokens"):
        too_many = torch.zeros(vocab + 1, dtype=torch.long)
        save_run(tmp_path, run.dense, run.sparse, run.bridges, **text, token_counts=too_many)


@pytest.fixture
def opened(monkeypatch):
    """The names of what DenseModel.from_pretrained opens during a test."""
    names, open_it = [], DenseModel.from_pretrained
    monkeypatch.setattr(
        DenseModel, "from_pretrained", lambda name: names.append(str(name)) or open_it(name)
    )
    return names


def test_the_dense_model_is_opened_once_and_only_where_it_is_asked_for(
    saved, circuit_of, task, opened, tmp_path
):
    run = load_run(tmp_path / "run")
    circuit_of(run.sparse).save(run.circuit_folder(task.name))
    run.export(tmp_path / "copy")
    assert run.prefix == () and task.name in run.circuits() and len(run.heldout())
    assert "dense" in repr(run) and run.skipped() == {} and not opened
    assert replace(run, output=tmp_path / "elsewhere").dense is run.dense
    assert opened == [str(tmp_path / "dense")]


def test_a_dense_model_that_cannot_fit_is_refused_before_it_is_opened(
    saved, circuit_of, build, opened, tmp_path, monkeypatch
):
    proofs, prove = [], model.prove
    monkeypatch.setattr(model, "prove", lambda *given: proofs.append(1) or prove(*given))
    circuit, names = circuit_of(saved.sparse), []
    for shape, says in (
        (dict(n_embd=16), "has 2 layers, .* of width 16, but these bridges .* of width 12"),
        (dict(n_layer=3), "has 3 layers, so 4 or 7 sites, of width 12, but"),
        (dict(vocab_size=40), "has 40 tokens and the sparse one 23"),
    ):
        other = build.dense(**shape)
        names.append(str(tmp_path / f"{len(names)}"))
        other.model.save_pretrained(names[-1])
        proofs.clear()
        with pytest.raises(ValueError, match=f"the dense model {says}"):
            load_run(tmp_path / "run", names[-1])
        for given in (names[-1], other.model):
            with pytest.raises(ValueError, match=f"the dense model {says}"):
                map_circuit(circuit, given)
        assert not proofs and not opened
    assert load_run(tmp_path / "run", str(tmp_path / "dense")).dense is not None
    assert proofs and opened  # control: one that fits is opened and proven


def test_a_run_that_names_a_dense_model_that_cannot_fit_says_so_when_it_is_asked_for(
    saved, build, opened, tmp_path
):
    build.dense(n_embd=16).model.save_pretrained(tmp_path / "dense")
    run = load_run(tmp_path / "run")
    with pytest.raises(ValueError, match="of width 16, but these bridges"):
        run.dense.logits(run.heldout())
    assert not opened
