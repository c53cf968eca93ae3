import pytest
import torch
from safetensors.torch import save_file

from sparse.circuits.means import load_means, node_means, save_means
from sparse.circuits.taps import recorded


def random_ids(n: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def test_node_means_are_the_mean_over_all_positions_whatever_the_batch(small):
    blocks = random_ids(7, 12)
    means = node_means(small, blocks, batch_size=3)
    with recorded(small) as values:
        small(blocks)
    assert list(means) == list(small.node_widths())
    for at, value in values.items():
        torch.testing.assert_close(means[at], value.mean((0, 1)))
    with pytest.raises(ValueError, match="no tokens"):
        node_means(small, blocks[:0])


def test_means_survive_a_folder_and_their_absence_is_explained(small, tmp_path):
    means = node_means(small, random_ids())
    save_means(tmp_path / "sparse", means, "abc")
    for fingerprint in (None, "abc"):
        loaded = load_means(tmp_path / "sparse", fingerprint)
        assert all(torch.equal(loaded[at], means[at]) for at in means)
    with pytest.raises(ValueError, match="node_means"):
        load_means(tmp_path)


def test_means_of_another_model_and_altered_ones_are_refused_and_old_files_are_read(tmp_path):
    means = {"0.attn.q": torch.arange(4.0)}
    save_means(tmp_path, means, "abc")
    with pytest.raises(ValueError, match="node means of model abc, but this model is def"):
        load_means(tmp_path, "def")
    path = tmp_path / "node_means.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ValueError, match="other values were saved"):
        load_means(tmp_path, "abc")
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="is broken"):
        load_means(tmp_path, "abc")
    save_file(means, path)  # as it was before means recorded their model
    assert torch.equal(load_means(tmp_path, "def")["0.attn.q"], means["0.attn.q"])
