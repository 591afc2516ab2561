from __future__ import annotations

import prometheus_client
import pytest

from mlx_optiq_ext.serving._state import state_of


class Generator:
    """A key for states."""


def test_counters_are_made_once_for_each_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    make = prometheus_client.CollectorRegistry
    monkeypatch.setattr(
        prometheus_client, "CollectorRegistry", lambda: made.append(make()) or made[-1]
    )
    first, second = Generator(), Generator()
    states = [state_of(generator) for generator in (first, second, first, second)]
    assert states[0] is states[2] is not states[1]
    assert len(made) == 2
