"""A short run of each fuzz target, with seeds that stay, so that a failure is one for everybody."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.embedded import Cluster
from tests.fuzz.wire import codec_input, feed_codec, live


@pytest.mark.parametrize("seed", range(5))
def test_the_codec_survives_mutated_conversations(seed: int) -> None:
    for n in range(400):
        feed_codec(codec_input(random.Random(f"{seed} {n}")))


@given(st.binary(max_size=200))
def test_the_codec_survives_noise(data: bytes) -> None:
    feed_codec(data)


@pytest.mark.parametrize("seed", range(2))
def test_a_live_proxy_survives_its_clients_and_its_server(cluster18: Cluster, seed: int) -> None:
    assert live(seed, 60, cluster18) == 60
