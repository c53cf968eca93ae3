import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from dense.weights.placement import copies, device_of, is_placed, stored

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))


@pytest.mark.parametrize("whole", [None, ["Sequential"]])
def test_every_weight_is_read_from_where_it_is_kept(whole, tmp_path):
    """Also where the hook of a module around it loads all weights inside (`whole`)."""
    want = {name: p.clone() for name, p in net().named_parameters()}
    how = dict(execution_device=CPU, preload_module_classes=whole)
    for model in (net(), cpu_offload(net(), **how), disk_offload(net(), tmp_path, **how)):
        for name, p in model.named_parameters():
            assert torch.equal(stored(model, name, p), want[name])


def test_a_weight_is_read_in_the_dtype_it_is_used_in():
    model = cpu_offload(net(), execution_device=CPU)
    name, p = "0.weight", model[0].weight
    assert p.is_meta and stored(model, name, p).dtype == torch.float32
    assert stored(model, name, p.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_weight_that_was_never_loaded_is_named():
    model = net().to("meta")
    with pytest.raises(ValueError, match="1.1.bias is on the device meta.*from_pretrained"):
        stored(model, "1.1.bias", model[1][1].bias)


def test_a_module_computes_where_its_hook_brings_its_weights():
    model = net()
    assert device_of(model[0]) == CPU and not is_placed(model)
    cpu_offload(model, execution_device=CPU)
    assert model[0].weight.is_meta and device_of(model[0]) == CPU and is_placed(model)
    add_hook_to_module(model[0], ModelHook(), append=True)  # accelerate chains hooks
    assert device_of(model[0]) == CPU


def test_a_tied_weight_counts_once(make):
    tied, apart = make("gpt2"), make("llama")
    assert copies(tied) == copies(apart) == set()
    assert copies(cpu_offload(tied, execution_device=CPU)) == {"lm_head.weight"}
    assert copies(cpu_offload(apart, execution_device=CPU)) == set()
