"""A sync that goes wrong is an error naming what differs, and leaves the sampler refusing to sample."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from sampling.attest import Canary, WeightsMismatch, make_canary, sync
from sampling.fingerprint import CHUNK, fingerprint
from sampling.protocol import Fingerprints, Weights

VOCAB = 11


class BigramSampler:
    """The smallest thing that can score: log softmax of one row of a table per token, and a bias."""

    def __init__(self) -> None:
        self.version = -1
        self.tensors: dict[str, torch.Tensor] = {}
        self.spoil: dict[str, torch.Tensor | None] = {}
        """Faults: what really ends up under a name (None: dropped)."""
        self.hidden_fault = torch.zeros(VOCAB)

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        self.version = -1
        self.tensors = {name: tensor.clone() for name, tensor in weights} | self.spoil
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if tensor is not None}
        self.version = version
        return {name: fingerprint(tensor) for name, tensor in self.tensors.items()}

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        table = self.tensors["table"] + self.hidden_fault
        return [table.log_softmax(-1)[list(s[:-1]), list(s[1:])].tolist() for s in sequences]


class CachingSampler(BigramSampler):
    """The same with a prefix cache, which `forgetful` does not drop on loading."""

    forgetful = False

    def __init__(self) -> None:
        super().__init__()
        self.cache: set[tuple[int, ...]] = set()

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        if not self.forgetful:
            self.cache.clear()
        return super().load(weights, version=version)

    def cached_prompt_tokens(self, prompt: Sequence[int]) -> int:
        hit = tuple(prompt) in self.cache
        self.cache.add(tuple(prompt))
        return len(prompt) if hit else 0


def policy(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "table": torch.randn(VOCAB, VOCAB, generator=generator),
        "norm": torch.randn(VOCAB, generator=generator),
    }


def synced(sampler, weights, *, version, previous=None):
    trainer = BigramSampler()
    trainer.load(weights.items(), version=0)
    return sync(
        sampler,
        lambda: iter(weights.items()),
        version=version,
        canary=make_canary(VOCAB, dtype="float32", length=32),
        score_trainer=trainer.score,
        previous=previous,
    )


def test_a_good_sync_reports_what_it_moved():
    sampler = BigramSampler()
    report = synced(sampler, policy(0), version=4)
    assert (report.version, report.tensors, report.bytes) == (4, 2, 4 * (VOCAB * VOCAB + VOCAB))
    assert sampler.version == 4 and report.canary_max == 0
    assert set(report.fingerprints) == {"table", "norm"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"norm": policy(0)["norm"]}, r"1 of 2 tensors differ: norm \[11\] is still version 3's"),
        ({"table": policy(1)["table"].T}, r"table \[11, 11\] is transposed"),
        ({"table": policy(1)["table"].bfloat16()}, r"table \[11, 11\] differs"),
        ({"norm": None}, r"norm \[11\] is missing"),
        ({"extra": torch.ones(2)}, "extra is held by the sampler but is not the trainer's"),
        (policy(0), "2 of 2 tensors differ: table .* is still version 3's; norm .* is still version 3's"),
    ],
)
def test_a_tensor_that_differs_is_named_with_its_fault(spoil, message):
    sampler = BigramSampler()
    before = synced(sampler, policy(0), version=3)
    sampler.spoil = spoil
    with pytest.raises(WeightsMismatch, match=message):
        synced(sampler, policy(1), version=4, previous=before)
    assert sampler.version == -1


@pytest.mark.parametrize("fault", [torch.arange(VOCAB) * 0.5, torch.full((VOCAB,), torch.nan)])
def test_a_fault_behind_the_fingerprints_is_caught_by_the_canary(fault):
    sampler = BigramSampler()
    sampler.hidden_fault = fault
    with pytest.raises(WeightsMismatch, match="canary: every tensor arrived"):
        synced(sampler, policy(0), version=0)
    assert sampler.version == -1


def test_a_prefix_cache_that_outlives_the_weights_is_caught():
    sampler = CachingSampler()
    synced(sampler, policy(0), version=0)
    synced(sampler, policy(1), version=1)
    sampler.forgetful = True
    with pytest.raises(WeightsMismatch, match="prefix cache: 32 tokens"):
        synced(sampler, policy(2), version=2)
    assert sampler.version == -1


def test_at_most_eight_tensors_are_named():
    sampler = BigramSampler()
    sampler.spoil = {f"layer.{i}": None for i in range(20)}
    with pytest.raises(WeightsMismatch, match=r"20 of 22 .*; and 12 more"):
        synced(sampler, policy(0) | {f"layer.{i}": torch.ones(1) for i in range(20)}, version=0)


def test_a_tensor_lost_on_the_way_to_a_loader_that_notices_gets_its_checkpoint_name():
    class Strict(BigramSampler):
        def load(self, weights: Weights, *, version: int) -> Fingerprints:
            received = {name: fingerprint(tensor) for name, tensor in weights if name != "norm"}
            raise WeightsMismatch("never filled: engine.norm_packed", received=received)

    with pytest.raises(WeightsMismatch, match=r"engine\.norm_packed; never received: norm"):
        synced(Strict(), policy(0), version=0)


def test_a_canary_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="two tokens or more"):
        Canary(sequences=((1,),), mean_tolerance=1, max_tolerance=1)
    with pytest.raises(ValueError, match="int8"):
        make_canary(VOCAB, dtype="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_any_changed_element_changes_the_fingerprint(dtype):
    tensor = torch.randint(0, 2, (7, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    prints = {fingerprint(tensor)}
    for i in range(tensor.numel()):
        changed = tensor.float()
        changed.view(-1)[i] = 1 - changed.view(-1)[i]
        prints.add(fingerprint(changed.to(dtype)))
    assert len(prints) == tensor.numel() + 1


def test_one_flipped_bit_in_any_place_changes_the_fingerprint():
    tensor = torch.zeros(3, dtype=torch.int32)
    prints = {fingerprint(tensor)}
    for i in range(3):
        for bit in range(32):
            flipped = tensor.clone()
            flipped[i] = -(1 << 31) if bit == 31 else 1 << bit
            prints.add(fingerprint(flipped))
    assert len(prints) == 3 * 32 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flipped_signs_do_not_cancel(dtype):
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    every_other = torch.where(torch.arange(64) % 2 == 1, -tensor, tensor)
    swapped = tensor.clone()
    swapped[1], swapped[3] = -tensor[1], -tensor[3]
    variants = [tensor, -tensor, every_other, -every_other, swapped]
    assert len({fingerprint(t) for t in variants}) == len(variants)


def test_transposition_permutation_shape_and_dtype_change_the_fingerprint():
    square = torch.arange(16.0).view(4, 4)
    variants = [
        square,
        square.T,
        square.flip(0),
        square.view(2, 8),
        square.view(16),
        square.view(torch.int32),
    ]
    assert len({fingerprint(t) for t in variants}) == len(variants)
    assert fingerprint(torch.zeros(2, 3)) != fingerprint(torch.zeros(3, 2))


def test_the_fingerprint_does_not_depend_on_memory_layout():
    base = torch.randn(2 * CHUNK + 10, generator=torch.Generator().manual_seed(0))  # more than one chunk of words
    assert fingerprint(base[1:]) == fingerprint(base[1:].clone())
    assert fingerprint(base[: 2 * CHUNK : 3]) == fingerprint(base[: 2 * CHUNK : 3].clone())
    swapped = base.clone()
    swapped[[3, -1]] = swapped[[-1, 3]]
    assert fingerprint(swapped) != fingerprint(base)


def test_sampling_imports_without_vllm():
    modules = [f"sampling.{name}" for name in ("attest", "fingerprint", "vllm_sampler", "vllm_reload", "vllm_setup")]
    code = f"import sys, {', '.join(modules)}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
