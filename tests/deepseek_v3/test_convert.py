"""Converted checkpoints: what transformers makes of them, what survives a round trip, what each layout holds."""

import contextlib
import importlib.util
import json
import math
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config

import deepseek_v3
from deepseek_v3 import convert_shards
from deepseek_v3.convert import convert, main
from deepseek_v3.convert_folder import DTYPES, read_folder, read_header
from deepseek_v3.convert_tensors import expected_tensors
from runtime.environment import environment
from runtime.models import load_causal_lm

# Blocks of 128 with ragged edges in both directions, and weights of an odd number of bytes.
RAGGED = dict(hidden_size=161, intermediate_size=201, moe_intermediate_size=137, q_lora_rank=140, kv_lora_rank=136)
# transformers' CPU reader divides a weight evenly by its scales: 576 rows by 5 is refused, 288 by 3 read wrongly.
EVEN = dict(
    hidden_size=256,
    intermediate_size=384,
    moe_intermediate_size=128,
    kv_lora_rank=64,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=64,
)
MTP = "model.layers.3."


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    """saved(bf16 or fp32, **config) -> a folder as our own model saves it, MTP layer and copies included."""

    def save(dtype=torch.bfloat16, **fields):
        folder = tmp_path_factory.mktemp("checkpoint") / "source"
        model = make(num_nextn_predict_layers=1, **fields).to(dtype)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{MTP}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{MTP}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return save


@pytest.fixture(scope="module")
def ragged(saved):
    return saved(**RAGGED)


def contents(folder):
    """Name -> tensor, over all files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def settings(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_element_of_the_released_checkpoint_is_expected():
    config = deepseek_v3.preset("671b", num_nextn_predict_layers=1)
    shapes = {name: tensor.shape for name, tensor in expected_tensors(config, fp8=True).items()}
    assert sum(map(math.prod, shapes.values())) == 684_531_386_000
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_scale_inv")) == 41_540_496
    assert shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    main_alone = expected_tensors(deepseek_v3.preset("671b"), fp8=False).values()
    assert sum(math.prod(tensor.shape) for tensor in main_alone) == 671_026_404_352 + 14_848


def test_the_expected_tensors_are_those_transformers_saves(config_of, tmp_path):
    transformers.DeepseekV3ForCausalLM(config_of(q_lora_rank=20)).save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in contents(tmp_path).items()}
    assert saved == {
        name: tensor.shape for name, tensor in expected_tensors(config_of(q_lora_rank=20), fp8=False).items()
    }


def test_only_linear_weights_become_8_bits(ragged, tmp_path):
    convert(ragged, tmp_path / "fp8", "fp8")
    tensors = contents(tmp_path / "fp8")
    quantised = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    higher = ("embed_tokens.", "lm_head.", "norm.", "gate.weight", "eh_proj.", "shared_head.")
    assert quantised == {name for name in contents(ragged) if re.search(r"(?<!eh)_proj(_with_mqa)?\.weight", name)}
    for name, tensor in tensors.items():
        if name in quantised:
            assert tensors[f"{name}_scale_inv"].shape == tuple(math.ceil(n / 128) for n in tensor.shape)
        elif name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == torch.bfloat16 and any(part in name for part in higher), name
    assert settings(tmp_path / "fp8")["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    assert settings(tmp_path / "fp8")["dtype"] == "bfloat16"


def test_fp8_to_bf16_is_code_times_the_scale_of_its_block(ragged, tmp_path):
    convert(ragged, tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    fp8, bf16 = contents(tmp_path / "fp8"), contents(tmp_path / "bf16")
    assert bf16.keys() == contents(ragged).keys()
    for name, tensor in bf16.items():
        if f"{name}_scale_inv" in fp8:
            rows, columns = tensor.shape
            scale = fp8[f"{name}_scale_inv"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            assert torch.equal(tensor, (fp8[name].float() * scale).bfloat16()), name
        else:
            assert torch.equal(tensor, fp8[name]), name
    assert "quantization_config" not in settings(tmp_path / "bf16")


def test_weights_of_bf16_quantised_once_round_trip_bit_for_bit(ragged, tmp_path):
    for source, target in ("source", "fp8"), ("fp8", "bf16"), ("bf16", "fp8 again"):
        convert(ragged if source == "source" else tmp_path / source, tmp_path / target, target.split()[0])
    assert_same(contents(tmp_path / "fp8"), contents(tmp_path / "fp8 again"))


def test_a_tensor_in_stretches_of_rows_comes_out_as_in_one_piece(ragged, tmp_path, monkeypatch):
    for elements in (1 << 20, 1):
        monkeypatch.setattr(convert_shards, "ELEMENTS_AT_ONCE", elements)
        convert(ragged, tmp_path / f"fp8 {elements}", "fp8")
        convert(tmp_path / f"fp8 {elements}", tmp_path / f"bf16 {elements}", "bf16")
    for precision in ("fp8", "bf16"):
        assert_same(contents(tmp_path / f"{precision} {1 << 20}"), contents(tmp_path / f"{precision} 1"))


def test_codes_survive_bf16_where_each_block_reaches_448(ragged, tmp_path):
    """Scales of a training in fp32 are no multiples of bf16 numbers: they move by a rounding, the codes don't."""
    convert(ragged, tmp_path / "fp8", "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensor.copy_(torch.empty_like(tensor).uniform_(1e-5, 1e-2, generator=generator))
        elif tensor.dtype == torch.float8_e4m3fn:
            codes = torch.randint(0, 127, tensor.shape, generator=generator, dtype=torch.uint8)  # 127 is NaN
            codes += 128 * torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.uint8)
            codes[::128, ::128] = 126
            tensor.copy_(codes.view(tensor.dtype))
    save_file(tensors, file, metadata={"format": "pt"})
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "back", "fp8")
    back, moved = contents(tmp_path / "back"), 0.0
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            moved = max(moved, (back[name] / tensor - 1).abs().max().item())
        else:
            assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert 0 < moved <= 2**-8


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_official_layout_and_back_changes_no_bit(saved, tmp_path, monkeypatch, ranks, fp8):
    monkeypatch.setattr(convert_shards, "ELEMENTS_AT_ONCE", 1)  # 128 rows at once: parts begin and end within
    heads = dict(qk_nope_head_dim=128, qk_rope_head_dim=128, v_head_dim=128)  # a whole block for each of 4 ranks
    source = saved(**heads, hidden_size=136, intermediate_size=512, moe_intermediate_size=512)
    if fp8:
        convert(source, tmp_path / "fp8", "fp8")
        source = tmp_path / "fp8"
    convert(source, tmp_path / "official", "official", model_parallel=ranks)
    convert(tmp_path / "official", tmp_path / "hf", "hf", shard_bytes=100_000)
    assert len(list((tmp_path / "official").glob("*.safetensors"))) == ranks
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_same(contents(source), contents(tmp_path / "hf"))
    assert settings(tmp_path / "hf") == settings(source)


def test_official_files_hold_the_official_names_and_each_rank_its_share(saved, tmp_path):
    source = saved(**EVEN)
    convert(source, tmp_path / "official", "official", model_parallel=2)
    held, hf = load_file(tmp_path / "official" / "model1-mp2.safetensors"), contents(source)
    attention = ["attn_norm", "attn.wq", "attn.wkv_a", "attn.kv_norm", "attn.wkv_b", "attn.wo", "ffn_norm"]
    moe = [
        "ffn.gate",
        *(
            f"ffn.{where}.w{i}"
            for where in ("shared_experts", *(f"experts.{e}" for e in range(4, 8)))
            for i in (1, 2, 3)
        ),
    ]
    names = {f"layers.{layer}.{part}.weight" for layer in range(4) for part in attention}
    names |= {f"layers.0.ffn.w{i}.weight" for i in (1, 2, 3)}
    names |= {f"layers.{layer}.{part}.weight" for layer in (1, 2, 3) for part in moe}
    names |= {f"layers.{layer}.ffn.gate.bias" for layer in (1, 2, 3)}
    names |= {
        f"layers.3.{part}.weight"
        for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed")
    }
    assert held.keys() == names | {"embed.weight", "norm.weight", "head.weight"}
    shares = {
        "embed.weight": hf["model.embed_tokens.weight"][32:],
        "head.weight": hf["lm_head.weight"][32:],
        "norm.weight": hf["model.norm.weight"],
        "layers.1.attn.wq.weight": hf["model.layers.1.self_attn.q_proj.weight"][256:],
        "layers.1.attn.wkv_a.weight": hf["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"],
        "layers.1.attn.wkv_b.weight": hf["model.layers.1.self_attn.kv_b_proj.weight"][256:],
        "layers.1.attn.wo.weight": hf["model.layers.1.self_attn.o_proj.weight"][:, 128:],
        "layers.0.ffn.w1.weight": hf["model.layers.0.mlp.gate_proj.weight"][192:],
        "layers.0.ffn.w2.weight": hf["model.layers.0.mlp.down_proj.weight"][:, 192:],
        "layers.0.ffn.w3.weight": hf["model.layers.0.mlp.up_proj.weight"][192:],
        "layers.1.ffn.shared_experts.w2.weight": hf["model.layers.1.mlp.shared_experts.down_proj.weight"][:, 64:],
        "layers.1.ffn.experts.5.w2.weight": hf["model.layers.1.mlp.experts.5.down_proj.weight"],
        "layers.1.ffn.gate.bias": hf["model.layers.1.mlp.gate.e_score_correction_bias"],
    }
    for name, share in shares.items():
        assert torch.equal(held[name], share), name


def test_rows_of_a_tensor_are_put_together_from_the_ranks_that_have_them(saved, tmp_path):
    source = saved(**EVEN)
    convert(source, tmp_path / "official", "official", model_parallel=4)
    folder, hf = read_folder(tmp_path / "official"), contents(source)
    layer = "model.layers.1"
    for part in ("self_attn.q_proj", "self_attn.o_proj", "self_attn.kv_a_proj_with_mqa", "mlp.experts.6.up_proj"):
        name = f"{layer}.{part}.weight"
        for start, stop in ((0, 1), (127, 128), (40, 100), (5, len(hf[name]))):
            assert torch.equal(folder.rows(name, start, stop), hf[name][start:stop]), name


def test_tensors_begin_where_their_elements_may(ragged, tmp_path):
    convert(ragged, tmp_path / "fp8", "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    held = read_header(file)
    assert any(math.prod(tensor.shape) % 4 for tensor in held if tensor.dtype == "F8_E4M3")
    assert all(tensor.offset % DTYPES[tensor.dtype].itemsize == 0 for tensor in held)


def test_the_mtp_layer_can_be_left_out(ragged, tmp_path):
    convert(ragged, tmp_path / "main", "fp8", drop_mtp=True)
    names = contents(tmp_path / "main").keys()
    assert not any(name.startswith(MTP) for name in names)
    assert {name for name in names if not name.endswith("_scale_inv")} == {
        name for name in contents(ragged) if not name.startswith(MTP)
    }
    assert settings(tmp_path / "main")["num_nextn_predict_layers"] == 0
    assert read_folder(tmp_path / "main").faults == []


def test_transformers_reads_both_precisions_and_both_readers_agree(saved, tmp_path):
    """On a CPU its FP8 reader dequantises; the MTP layer is read by our model, left behind by theirs."""
    convert(saved(torch.float32, **EVEN), tmp_path / "fp8", "fp8", shard_bytes=300_000)
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16", shard_bytes=300_000)
    plain = contents(tmp_path / "bf16")
    for definition in (transformers.DeepseekV3ForCausalLM, deepseek_v3.DeepseekV3ForCausalLM):
        states = []
        for precision in ("fp8", "bf16"):
            model, info = definition.from_pretrained(
                tmp_path / precision, dtype=torch.bfloat16, output_loading_info=True
            )
            assert not info["missing_keys"] and not info["mismatched_keys"]
            states.append(model.state_dict())
        assert_same(*states)
        gate_up = states[0]["model.layers.1.mlp.experts.gate_up_proj"]
        assert torch.equal(gate_up[2, 128:], plain["model.layers.1.mlp.experts.2.up_proj.weight"])
    assert torch.equal(states[0][f"{MTP}mlp.experts.down_proj"][7], plain[f"{MTP}mlp.experts.7.down_proj.weight"])


def test_our_loader_reads_both_precisions_and_runs_no_code_that_lies_beside_them(saved, tmp_path):
    source = saved(**EVEN)
    ran = tmp_path / "ran"
    (source / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: ...\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling.Model")
    (source / "config.json").write_text(json.dumps(settings(source) | {"auto_map": auto_map}))
    convert(source, tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    assert (tmp_path / "bf16" / "modeling.py").exists()  # as released folders have it
    states = [load_causal_lm(tmp_path / precision, dtype=torch.bfloat16).state_dict() for precision in ("fp8", "bf16")]
    assert_same(*states)
    down = contents(tmp_path / "bf16")[f"{MTP}mlp.experts.7.down_proj.weight"]
    assert torch.equal(states[0][f"{MTP}mlp.experts.down_proj"][7], down)
    assert not ran.exists()


def test_other_files_go_along_and_pickles_do_not(ragged, tmp_path):
    source = shutil.copytree(ragged, tmp_path / "source")
    (source / "optimizer.pt").write_bytes(b"never opened")
    (source / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    convert(source, tmp_path / "target", "bf16")
    names = {file.name for file in (tmp_path / "target").iterdir()}
    assert names == {
        *(".gitattributes", "config.json", "conversion.json", "generation_config.json", "tokenizer.json"),
        *("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
    }


def test_an_unknown_field_of_the_config_stays_as_it_was(ragged, tmp_path):
    source = shutil.copytree(ragged, tmp_path / "source")
    (source / "config.json").write_text(json.dumps(settings(source) | {"torch_dtype": "float32", "of_its_own": [1]}))
    convert(source, tmp_path / "target", "bf16")
    after = settings(tmp_path / "target")
    assert after["of_its_own"] == [1] and after["torch_dtype"] == "bfloat16"
    assert DeepseekV3Config.from_pretrained(tmp_path / "target").hidden_size == 161


def test_check_tells_what_a_folder_holds(ragged, tmp_path, capsys):
    assert main(["check", str(ragged)]) == 0
    elements = sum(tensor.numel() for tensor in contents(ragged).values())
    said = capsys.readouterr().out
    assert "3 layers + MTP" in said and f"{elements:,} elements" in said and "BF16" in said
    convert(ragged, tmp_path / "fp8", "fp8")
    assert main(["check", str(tmp_path / "fp8")]) == 0
    assert "FP8" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_reads_what_is_written(tmp_path):
    """By its own reader of files; its log-probs are transformers'."""
    from sampling.vllm_setup import cpu_attention, guest, hf_overrides

    torch.manual_seed(0)
    config = deepseek_v3.preset("tiny", initializer_range=0.1, num_nextn_predict_layers=1)
    deepseek_v3.DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "bf16", "bf16", shard_bytes=300_000)
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 1
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    ids = torch.randint(512, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    with guest(), contextlib.ExitStack() as stack:
        stack.enter_context(environment("VLLM_ENABLE_V1_MULTIPROCESSING", "0"))
        from vllm import LLM, SamplingParams

        written = settings(tmp_path / "bf16")
        llm = LLM(
            str(tmp_path / "bf16"),
            dtype="float32",
            load_format="safetensors",
            max_model_len=64,
            enforce_eager=True,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=1 << 26,
            enable_chunked_prefill=False,
            max_num_batched_tokens=4096,
            hf_overrides=hf_overrides(written, on_cpu=True),
            **cpu_attention(written, dtype="float32", while_open=stack),
        )
        request = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": ids[0].tolist()}], request, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
    scored = [of[token].logprob for of, token in zip(output.prompt_logprobs[1:], ids[0, 1:].tolist(), strict=True)]
    assert (torch.tensor(scored) - expected).abs().max() < 1e-3
