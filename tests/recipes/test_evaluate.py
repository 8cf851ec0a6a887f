"""pass@k of a checkpoint, from the command's own configuration to its files."""

import json

import pyarrow.parquet as pq
import pytest
import torch

import deepseek_v3
from recipes.evaluate import EvaluateConfig, run
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import SamplingConfig
from runtime.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_evaluation_is_printed_and_written(checkpoint, tmp_path, capsys):
    config = EvaluateConfig(
        model=checkpoint,
        problems=5,
        samples=3,
        k=(1, 3),
        sampling=SamplingConfig(backend="native", max_tokens=6),
        output=str(tmp_path / "out"),
    )
    run(config)
    shown = capsys.readouterr().out
    assert "pass@1" in shown and "pass@3" in shown and "5 problems × 3 samples" in shown
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert written["pass_at"]["1"]["mean"] == 0 and written["pass_at"]["1"]["high"] > 0.3
    assert pq.read_table(tmp_path / "out/step-000000.parquet").num_rows == 15


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(UserError, match="k=8: pass@k needs at least k samples per problem, samples=4"):
        EvaluateConfig(samples=4, k=(1, 8))
