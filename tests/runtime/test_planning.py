"""Parameters, bytes and FLOPs: by hand, and against the model, torch's FLOP counter, peft and the decoder."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from deepseek_v3 import PRESETS, DeepseekV3ForCausalLM, preset
from deepseek_v3.decode import GroupDecoder
from runtime.adapters import add_adapters
from runtime.errors import UserError
from runtime.planning.activations import Kernels, block_keeps
from runtime.planning.census import block_flops, count, head_flops, latent_values, native_values
from runtime.planning.cost import decoding
from runtime.planning.layout import Layout, choose, gpu
from runtime.planning.memory import TRAINING, Work, total, training
from runtime.settings import LoraConfig

ALONE = Layout(gpus=1, sharded=False, launched=True)


def work(**changes: object) -> Work:
    fields: dict = dict(tokens=4096, predicted=4096, passes=2, summed=True, checkpointing=True)
    return Work(**fields | {"kernels": Kernels(bf16=True, cuda=True)} | changes)


def lines(name: str, layout: Layout, **changes: object) -> dict[str, dict[str, float]]:
    return {line.name: dict(line.bytes) for line in training(count(preset(name)), work(**changes), layout)}


# --- parameters -------------------------------------------------------------------------------------------------------


def test_671b_is_the_papers() -> None:
    census = count(preset("671b"))
    assert (census.total, census.activated, census.bias) == (671_026_404_352, 37_552_282_624, 14_848)
    whole = count(preset("671b", num_nextn_predict_layers=1))
    assert whole.mtp == 11_610_068_224 - 256  # without the router's bias
    assert (whole.total - whole.mtp, whole.activated) == (census.total, census.activated)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_counted_once(name: str) -> None:
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(preset(name))
    assert count(preset(name)).total == sum(p.numel() for p in model.parameters())


def test_adapters_are_pefts() -> None:
    lora = LoraConfig(rank=4)
    with torch.device("meta"):
        model = add_adapters(DeepseekV3ForCausalLM(preset("tiny", q_lora_rank=24, num_nextn_predict_layers=1)), lora, 0)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(preset("tiny", q_lora_rank=24, num_nextn_predict_layers=1), lora).adapters == learning


# --- memory -----------------------------------------------------------------------------------------------------------


def test_states_of_the_tiny_model_to_the_byte() -> None:
    attention = 128 * 192 + 128 * 576 + 512 + 512 * 256 + 192 * 128 + 2 * 128
    dense, experts, rest = 3 * 128 * 384, 4 * 3 * 128 * 96, 4 * 128 + 3 * 128 * 96
    parameters = 2 * 512 * 128 + 128 + 2 * attention + dense + experts + rest
    assert parameters == 972_928
    one = lines("tiny", ALONE)
    assert one["weights"]["step"] == 4 * parameters + 4 * 4  # and the bias of four experts
    assert (one["gradients"]["step"], one["optimizer"]["step"]) == (4 * parameters, 8 * parameters)
    eight = lines("tiny", Layout(gpus=8, sharded=True, launched=True))
    assert eight["weights"]["step"] == 4 * parameters / 8 + 4 * 4
    assert (eight["gradients"]["step"], eight["optimizer"]["step"]) == (4 * parameters / 8, parameters)


def test_muon_keeps_one_moment_of_inner_matrices() -> None:
    inner = 2 * (128 * 192 + 128 * 576 + 512 * 256 + 192 * 128) + 3 * 128 * 384 + 3 * 128 * 96
    assert lines("tiny", ALONE, muon=True)["optimizer"]["step"] == 8 * 972_928 - 4 * inner


def test_a_frozen_mtp_layer_has_weights_alone() -> None:
    plain, mtp = (
        {
            line.name: line.bytes["step"]
            for line in training(count(preset("tiny", num_nextn_predict_layers=n)), work(), ALONE)
        }
        for n in (0, 1)
    )
    assert mtp["weights"] > plain["weights"]
    assert (mtp["optimizer"], mtp["gradients"]) == (plain["optimizer"], plain["gradients"])


def test_a_cpu_fills_heads_up_to_one_size() -> None:
    """16 heads, 192 values of query and key, 128 of value and output; the output is kept without filling, too."""
    cpu, cuda = (block_keeps(preset("16b"), Kernels(bf16=False, cuda=cuda), dense=True) for cuda in (False, True))
    assert cpu - cuda == 4 * 16 * ((4 * 192 + 128) - (2 * 192 + 2 * 128))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_more_gpus_never_need_more_memory_each(name: str, checkpointing: bool) -> None:
    census = count(preset(name))
    before = dict.fromkeys(TRAINING, float("inf"))
    for gpus in (2**n for n in range(1, 12)):
        layout = choose(census, gpu("h100"), gpus=gpus, tokens=4096, kept=1e9)
        made = training(census, work(checkpointing=checkpointing), layout)
        now = {phase: total(made, phase) for phase in TRAINING}
        assert all(now[phase] <= before[phase] for phase in TRAINING)
        before = now


def test_degrees_divide_what_they_say() -> None:
    census = count(preset("671b"))
    plain = Layout(gpus=64, sharded=True, launched=False)
    wide = Layout(gpus=64, sharded=True, launched=False, expert=64)
    tensor = Layout(gpus=64, sharded=True, launched=False, tensor=8)
    gathered, by_expert, by_tensor = (
        next(line.bytes["forward"] for line in training(census, work(), layout) if line.name == "gathered")
        for layout in (plain, wide, tensor)
    )
    # Two layers in bf16: mixtures, but once their experts are spread the dense ones are larger.
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168 + 1536 + 512 + 2 * 7168
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    root = 2 * 129280 * 7168 + 7168
    assert gathered == 2 * (2 * (attention + 257 * expert + 256 * 7168) + root)
    assert by_expert == 2 * (2 * (attention + dense) + root)
    assert by_tensor < gathered / 7
    kept = [
        next(line.bytes["backward"] for line in training(census, work(), layout) if line.name == "activations")
        for layout in (plain, tensor)
    ]
    assert kept[1] == pytest.approx(kept[0] / 8)


def test_dualpipe_v_keeps_half_a_layer_more_and_one_stage_of_weights() -> None:
    census = count(preset("671b"))
    layout = Layout(gpus=1024, sharded=True, launched=False, expert=64, pipeline=16)
    whole = {line.name: line.bytes for line in training(census, work(), Layout(gpus=64, sharded=True, launched=False))}
    stage = {line.name: line.bytes for line in training(census, work(), layout)}
    layers = count(preset("671b")).layers[-4:]  # of 61 over 16
    own = sum(layer.total for layer in layers) + 2 * 129280 * 7168 + 7168
    assert stage["weights"]["step"] == 4 * own / 64 + 4 * 14_848
    inputs = 4 * 4096 * 7168
    assert stage["activations"]["forward"] - whole["activations"]["forward"] == pytest.approx(
        inputs * (4 * 16.5 - 61), rel=1e-6
    )


def test_degrees_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="expert=3: must divide the 8 GPUs"):
        Layout(gpus=8, sharded=True, launched=False, expert=3)
    with pytest.raises(UserError, match="pipeline=3: must divide gpus=8"):
        choose(count(preset("tiny")), gpu("h100"), gpus=8, tokens=1, kept=1, pipeline=3)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UserError, match="gpu='H10': no such kind; did you mean h100"):
        gpu("H10")


# --- cache and FLOPs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 6])
def test_cached_values_are_the_decoders(heads: int) -> None:
    config = preset("tiny", num_attention_heads=heads)
    decoder = GroupDecoder(DeepseekV3ForCausalLM(config), [[1, 2, 3]], n=2, max_tokens=5)
    rows, entries, tokens, values = decoder.new_BKtE[0].shape
    assert (rows, tokens) == (2, 5)
    assert native_values(config) == entries * values
    assert latent_values(config) == 576


@pytest.mark.parametrize("name", ["tiny", "5m"])
def test_flops_are_those_torch_counts_of_transformers_model(name: str) -> None:
    """Its eager attention multiplies masked positions too, so that every token sees all 48."""
    config, length = preset(name), 48
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.DeepseekV3ForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    census = count(config)
    assert counter.get_total_flops() == length * (block_flops(census, length) + head_flops(census))


def test_attention_costs_two_products_of_every_head_at_every_token_seen() -> None:
    census = count(preset("671b"))
    assert block_flops(census, 100) - block_flops(census, 0) == 2 * 61 * 128 * (192 + 128) * 100


def test_a_lone_row_decodes_at_the_speed_of_reading_what_it_activates() -> None:
    census, kind = count(preset("671b")), gpu("h200")
    seconds = decoding(census, kind, gpus=16, tensor=16, rows=1, context=0, width=2)
    read = 2 * (census.activated - census.embedding) / 16
    assert seconds == pytest.approx(read / kind.bandwidth / 0.45, rel=1e-3)
