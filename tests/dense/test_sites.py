import pytest

from dense import SiteError
from dense.sites import find_blocks


def test_the_blocks_are_the_shallowest_list_as_long_as_the_model_is_deep(make):
    assert find_blocks(make("gpt2"))[0] == "transformer.h"
    assert find_blocks(make("qwen3_moe"))[0] == "model.layers"
    model = make("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(SiteError, match="says 5 layers, but no ModuleList.*model.layers', 3"):
        find_blocks(model)
