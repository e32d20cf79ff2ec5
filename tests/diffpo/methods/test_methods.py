"""Every published method through the real trainer: it starts where policy and reference agree, and it moves."""

import methods
import pytest

from diffpo import methods as objectives


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return methods.write_data(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("name", objectives.names())
def test_a_method_starts_at_its_reference_and_moves(tiny_sdxl, make_config, data, name):
    methods.run(name, tiny_sdxl, make_config, data)
