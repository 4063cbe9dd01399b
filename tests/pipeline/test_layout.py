"""Cells fit on their nodes, use every GPU, and leave no CPU without work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EncodeConfig
from pipeline.layout import Node, cluster_layout, local_layout
from pipeline.settings import ConfigError

HEAD = Node("head", 0)


def gpu_nodes(number, cpus=32, gpus=4):
    return [Node(f"gpu-{i}", cpus, gpus) for i in range(number)]


@pytest.mark.parametrize(
    ("num_cpus", "settings", "expected"),
    [
        (2, {}, (1,)),
        (1, {}, (1,)),
        (16, {}, (15,)),
        (16, {"encoder_cpus": 4}, (12,)),
        (2, {"cells": 2}, (1, 1)),  # raised to what is asked
        (16, {"cells": 2}, (7, 7)),
        (2, {"decoders": 6}, (6,)),
    ],
)
def test_local_machine_gives_what_it_has_and_what_is_asked(num_cpus, settings, expected):
    assert local_layout(num_cpus, EncodeConfig(**settings)).decoders == expected


def test_cpus_of_a_local_run_are_those_of_its_cells():
    config = EncodeConfig(cells=2, decoders=3, encoder_cpus=2)
    assert local_layout(4, config).num_cpus(config) == 2 * (2 + 3)


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([HEAD, *gpu_nodes(2)], {"encoder_gpus": 1}, (7,) * 8),
        ([HEAD, *gpu_nodes(1)], {"encoder_gpus": 0.5}, (3,) * 8),
        ([HEAD, *gpu_nodes(1)], {"encoder_gpus": 2}, (15,) * 2),
        ([HEAD, *gpu_nodes(1, cpus=6)], {"encoder_gpus": 1}, (1,) * 3),  # CPUs for 3 of 4 GPUs
        ([HEAD, *gpu_nodes(2)], {"encoder_gpus": 1, "cells": 2}, (31, 31)),  # one on each node
        ([HEAD, *gpu_nodes(1, cpus=10, gpus=3)], {"encoder_gpus": 1}, (2, 2, 2)),
        ([HEAD, Node("a", 16), Node("b", 4)], {}, (15, 3)),  # one for each node, as large as it is
        ([HEAD, Node("a", 16)], {"decoders": 4}, (4,)),
        ([HEAD, Node("a", 16)], {"cells": 3, "decoders": 4}, (4,) * 3),
        ([HEAD, Node("a", 16)], {"cells": 4, "decoders": 4}, (4,) * 4),  # the fourth waits
        ([HEAD], {"cells": 2, "decoders": 7}, (7, 7)),  # all wait for nodes to join
    ],
)
def test_cluster_is_filled_with_cells(nodes, settings, expected):
    assert cluster_layout(nodes, EncodeConfig(**settings)).decoders == expected


def test_cell_that_fits_nowhere_is_said_with_what_there_is():
    nodes = [HEAD, *gpu_nodes(2, gpus=0)]
    with pytest.raises(ConfigError, match=r"2 CPUs and 1 GPU on one node.* 2 nodes of 32 CPUs and"):
        cluster_layout(nodes, EncodeConfig(encoder_gpus=1))


def test_gpus_are_not_split_unevenly():
    config = EncodeConfig(encoder_gpus=1.5)
    with pytest.raises(ConfigError, match=r"encoder_gpus 1\.5"):
        cluster_layout(gpu_nodes(1), config)
    with pytest.raises(ConfigError, match=r"encoder_gpus 1\.5"):
        local_layout(8, config)


@given(
    num_nodes=st.integers(1, 5),
    size=st.tuples(st.integers(2, 64), st.integers(0, 8)),
    encoder_cpus=st.integers(1, 4),
    encoder_gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    settings=st.fixed_dictionaries({"decoders": st.integers(0, 8), "cells": st.integers(0, 4)}),
    choices=st.randoms(use_true_random=False),
)
def test_on_nodes_that_are_alike_all_cells_find_a_place_wherever_the_others_went(
    num_nodes, size, encoder_cpus, encoder_gpus, settings, choices
):
    config = EncodeConfig(encoder_cpus=encoder_cpus, encoder_gpus=encoder_gpus, **settings)
    nodes = [Node(str(number), *size) for number in range(num_nodes)]
    try:
        layout = cluster_layout(nodes, config)
    except ConfigError:
        return
    free = [list(size) for _ in range(num_nodes)]
    for number, decoders in enumerate(layout.decoders):
        needed = (encoder_cpus + decoders, encoder_gpus)
        room = [node for node in free if node[0] >= needed[0] and node[1] >= needed[1]]
        if number >= sum(_holds(size, needed) for _ in nodes):
            return  # more are asked for than there is room for
        assert room, (layout, free)
        chosen = choices.choice(room)
        chosen[0] -= needed[0]
        chosen[1] -= needed[1]


def _holds(size, needed):
    """Return how many things of ``needed`` a node of ``size`` holds."""
    return min(int(has // asked) for has, asked in zip(size, needed, strict=True) if asked)
