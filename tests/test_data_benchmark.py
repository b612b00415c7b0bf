"""The benchmark of the data, whose figures tests/test_tools.py looks at."""

import pytest

from layerdecomp.data.benchmark import benchmark
from layerdecomp.data.triplets import TripletConfig
from layerdecomp.errors import InputError


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_of_none_is_refused_before_anything_is_made(count: int) -> None:
    with pytest.raises(InputError, match=f"count is {count}; expected at least 1"):
        benchmark(TripletConfig(), count)
