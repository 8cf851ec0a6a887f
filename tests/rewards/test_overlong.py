"""DAPO's equation 13 by hand."""

import pytest

from rewards.overlong import overlong_punishment


@pytest.mark.parametrize(
    ("length", "punishment"), [(0, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0), (17, -1.0)]
)
def test_it_falls_in_a_line_over_the_buffer(length, punishment):
    assert overlong_punishment(length, max_tokens=16, buffer=4) == punishment


def test_a_buffer_of_nothing_is_refused():
    with pytest.raises(ValueError, match="buffer=0"):
        overlong_punishment(3, max_tokens=16, buffer=0)
