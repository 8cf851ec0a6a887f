"""A settings file is checked before anything starts, and the message names what to mend."""

import pytest

from rewards.model_based.judge import JudgeConfig
from rewards.model_based.route import Routing
from rewards.model_based.settings import read_settings


def refusal(tmp_path, text, kind=Routing):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        read_settings(file, kind)
    return str(error.value).removeprefix(f"{file}: ").removeprefix(f"{file} ")


def test_nested_settings_are_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "reward_model: runs/rm\njudge:\n  votes: 5\n  endpoint: {url: 'https://a.example/v1', model: m, timeout: 3}\n"
    )
    routing = read_settings(file, Routing)
    assert routing.reward_model == "runs/rm" and routing.verifier is None
    assert routing.judge is not None and routing.judge.votes == 5
    assert routing.judge.endpoint is not None and routing.judge.endpoint.timeout == 3.0


def test_mistakes_name_the_setting(tmp_path):
    assert refusal(tmp_path, "judge: {vots: 3}") == "judge.vots is not a setting; did you mean votes?"
    assert refusal(tmp_path, "judge: {votes: many}") == "judge.votes='many': expected int"
    assert refusal(tmp_path, "judge: {votes: true}") == "judge.votes=True: expected int"
    assert refusal(tmp_path, "judge: {votes: 0}") == "judge.votes=0: use 1 or more"
    assert refusal(tmp_path, "judge: {part: half}") == "judge.part='half': expected 'answer', 'whole'"
    assert refusal(tmp_path, "judge: 3") == "judge=3: expected JudgeConfig or NoneType"
    assert refusal(tmp_path, "judge: {endpoint: {url: 'https://a.example/v1'}}") == "judge.endpoint.model is missing"
    assert refusal(tmp_path, "- judge") == "settings: expected `name: value` lines, found ['judge']"
    assert refusal(tmp_path, "judge: [").startswith("is not YAML")
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        read_settings(tmp_path / "none.yaml", JudgeConfig)


def test_yaml_makes_no_objects(tmp_path):
    assert refusal(tmp_path, "judge: !!python/object/apply:os.getpid []").startswith("is not YAML")
