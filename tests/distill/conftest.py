"""What tests of the generator share: a teacher with a known distribution, problems, and commands that can be killed."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import deepseek_v3
from distill.config import DistillConfig, ExpertConfig
from distill.problems import ProblemsConfig
from recipes.cli import to_dict
from recipes.tiny import make_tokenizer
from tests.commands import Forks

SAYS = {"1": 0.2, "2": 0.2, "3": 0.1, "<think>": 0.1}
"""Each next token of the teacher's and its probability, whatever came before; with the rest it ends."""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 whose layers add nothing, so that every token is an independent draw from SAYS."""
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("teacher")
    config = deepseek_v3.preset(
        "tiny", hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = deepseek_v3.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight.fill_(-30 / 16)
        for text, probability in {**SAYS, tokenizer.eos_token: 1 - sum(SAYS.values())}.items():
            (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            model.lm_head.weight[token] = math.log(probability) / 16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven sums with golds the teacher may hit and original answers, right, wrong and missing; three things to say."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    sums = [
        {"id": f"sum/{i}", "prompt": f"{i} and how much is {i + g}?", "answer": str(g), "domain": "math"}
        for i, g in enumerate([1, 2, 1, 2, 3, 2, 1])
    ]
    for row, response in zip(sums, ["It is \\boxed{1}.", "It is \\boxed{3}.", None, "\\boxed{2}"], strict=False):
        row["response"] = response
    talk = [{"prompt": f"Say something about {what}.", "domain": "talk"} for what in ("rain", "tea", "chess")]
    rows = [*sums[:4], *talk, *sums[4:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, sums[0]]))
    return file


@pytest.fixture(scope="session")
def config(teacher: Path, problems: Path) -> DistillConfig:
    """Two experts, batches of two, everything to lose."""
    common: dict[str, Any] = dict(model=str(teacher), backend="native", max_tokens=4, samples=3)
    return DistillConfig(
        problems=(ProblemsConfig(path=str(problems)),),
        experts=(
            ExpertConfig(domain="math", system="Think.", **common),
            ExpertConfig(domain="talk", reasoning=False, original="sample", grader="none", review=True, **common),
        ),
        near_duplicates=None,
        batch=3,
        policy="shortest",
        rows_per_shard=4,
    )


class Commands(Forks):
    """`python -m recipes.distill --resume`."""

    start = Forks.run

    def __init__(self, config: DistillConfig, folder: Path, *, disk: str | None = None) -> None:
        """folder: for settings and output. disk: options of a tmpfs at folder/disk, say "size=4m"."""
        (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
        super().__init__("recipes.distill", folder, disk=disk)


@pytest.fixture(scope="session")
def commands(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(config, tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def small_disk(config: DistillConfig, tmp_path: Path, mounts: None) -> Iterator[Commands]:
    """Commands that see a disk of 2 MB."""
    commands = Commands(config, tmp_path, disk="size=2m")
    while not os.path.ismount(commands.disk):
        time.sleep(0.01)
    yield commands
    commands.close()


class Server(ThreadingHTTPServer):
    """A real one; `answer` decides what it says, `seen` is what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = lambda body: (503, b"not ready")
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.add(self.headers.get("Authorization"))
        status, content = self.server.answer(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def shards() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of all that a run has exported, and the names of what must not be left lying about."""

    def collect(run_dir: Path) -> dict[str, bytes]:
        found = {path.name: path.read_bytes() for path in sorted((run_dir / "shards").iterdir())}
        leftovers = [path.name for path in run_dir.rglob("*") if ".tmp" in path.name]
        return {**found, "leftovers": " ".join(leftovers).encode()}

    return collect
