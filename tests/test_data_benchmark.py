"""The data benchmark; tests/test_tools.py checks its figures."""

import pytest

from layerdecomp.data.benchmark import benchmark
from layerdecomp.data.triplets import TripletConfig
from layerdecomp.errors import InputError


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_below_one_is_rejected(count: int) -> None:
    with pytest.raises(InputError, match=f"count is {count}; expected at least 1"):
        benchmark(TripletConfig(), count)
