"""The doctor starts a real jail; what is missing is named with what would help."""

import sys

import pytest

from rewards.sandbox.backend import SandboxUnavailable
from rewards.sandbox.doctor import diagnose, lines, remedy
from rewards.sandbox.supervisor import Jail

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")


def test_this_machine_has_every_layer() -> None:
    diagnosis = diagnose()
    assert diagnosis.available
    assert {"namespaces", "mounts", "seccomp", "capabilities", "resource limits"} <= {x.name for x in diagnosis.layers}
    assert list(lines(diagnosis))[-1] == "Programs run in the jail."


def test_a_missing_layer_is_named_and_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Jail) -> None:
        raise SandboxUnavailable("namespaces", "unshare: Operation not permitted")

    monkeypatch.setattr(Jail, "__init__", refuse)
    diagnosis = diagnose()
    assert not diagnosis.available
    by_name = {layer.name: layer for layer in diagnosis.layers}
    assert by_name["kernel"].available
    assert "unshare: Operation not permitted; " + remedy("namespaces") == by_name["namespaces"].note
    assert not by_name["namespaces"].available and not by_name["seccomp"].available
    assert "not tried" in by_name["seccomp"].note
    assert "refused" in list(lines(diagnosis))[-1]
