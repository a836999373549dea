"""What the controller asks of the learner ranks, without them."""

from __future__ import annotations

from typing import Any

import pytest

from stateset_ray.actors.learner_group import LearnerGroup
from stateset_ray.actors.learner_rank import LearnerRank
from stateset_ray.config import load_config


class Dead:
    """A rank whose process is gone."""

    def __init__(self) -> None:
        self.secure = self

    def remote(self, _: Any) -> None:
        raise RuntimeError("the actor died")


def test_a_dead_rank_is_noticed_also_where_nothing_came_to_learn_from() -> None:
    """Every group may have been given up because the weights were lost with the rank's node."""
    group = object.__new__(LearnerGroup)
    group._ranks = [Dead()]
    with pytest.raises(RuntimeError, match="died"):
        group.secure([])


def test_a_rank_secures_nothing_where_there_is_nothing() -> None:
    rank = object.__new__(LearnerRank)
    rank._config = load_config(None, ["model.name=tiny"])
    assert rank.secure({"refs": []}) == []
