"""What a checkpoint is loaded as: an MTP layer is kept, one that is only promised isn't made up."""

import pytest
import torch
import transformers

import deepseek_v3
from runtime.adapters import add_adapters
from runtime.models import load_causal_lm, mtp_layer
from runtime.settings import LoraConfig

SMALL = dict(
    vocab_size=96, hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    intermediate_size=16, moe_intermediate_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deepseek_v3.DeepseekV3ForCausalLM(
            deepseek_v3.preset("tiny", num_nextn_predict_layers=1, **SMALL)
        ).save_pretrained(path)
    return path


def test_an_mtp_layer_is_loaded_and_one_the_checkpoint_only_names_is_left_out(folder, tmp_path, caplog):
    whole = load_causal_lm(folder)
    assert mtp_layer(whole) is not None and not caplog.records
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)  # of the layer it keeps the name alone
    assert theirs.config.num_nextn_predict_layers == 1
    model = load_causal_lm(tmp_path)
    assert "names an MTP layer" in caplog.text
    assert mtp_layer(model) is None and model.config.num_nextn_predict_layers == 0
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert model.state_dict().keys() == deepseek_v3.DeepseekV3ForCausalLM(model.config).state_dict().keys()


def test_a_model_of_another_kind_has_no_mtp_layer():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    assert mtp_layer(transformers.LlamaForCausalLM(config)) is None


def test_adapters_are_put_on_the_main_layers_alone(folder):
    model = add_adapters(load_causal_lm(folder), LoraConfig(rank=2), seed=0)
    layers = {name.split(".layers.")[1].split(".")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {"0", "1"}
