"""Samples: what must hold for any conversation, forked or not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.grpo.samples import samples
from stateset_ray.types import StopReason, Task, Trajectory, Turn

_IDS = st.lists(st.integers(0, 50_000), max_size=6).map(tuple)


@st.composite
def _turns(draw: st.DrawFn) -> Turn:
    sampled = draw(_IDS)
    return Turn(
        context_ids=draw(_IDS),
        token_ids=sampled,
        logprobs=tuple(draw(st.floats(-20, 0, width=32)) for _ in sampled),
        policy_version=draw(st.integers(0, 100)),
        forked=draw(st.booleans()),
    )


def _trajectory(turns: list[Turn]) -> Trajectory:
    return Trajectory("r/0/t/0/0", Task("t", 0), 0, (), tuple(turns), StopReason.COMPLETED)


@given(st.lists(_turns(), max_size=6))
def test_sampled_tokens_are_masked_once_and_nothing_else(turns: list[Turn]) -> None:
    rows = samples(_trajectory(turns))
    masks = [row.loss_mask for row in rows]

    def flat(name: str) -> list[float]:
        return [v for row, mask in zip(rows, masks, strict=True) for v in getattr(row, name)[mask].tolist()]

    assert flat("token_ids") == [i for turn in turns for i in turn.token_ids]
    assert flat("logprobs") == [p for turn in turns for p in turn.logprobs]
    assert flat("versions") == [turn.policy_version for turn in turns for _ in turn.token_ids]
    for row in rows:
        lengths = {
            len(getattr(row, f)) for f in ("token_ids", "loss_mask", "logprobs", "advantages", "versions")
        }
        assert len(lengths) == 1
        assert row.loss_mask.any()
        assert np.array_equal(row.advantages, row.loss_mask.astype(np.float32))
        assert not row.logprobs[~row.loss_mask].any()
        assert (row.versions[~row.loss_mask] == -1).all()
        assert (row.token_ids.dtype, row.loss_mask.dtype, row.versions.dtype) == (
            np.int32,
            np.bool_,
            np.int32,
        )
        assert (row.logprobs.dtype, row.advantages.dtype) == (np.float32, np.float32)


@given(st.lists(_turns(), min_size=1, max_size=6))
def test_each_masked_token_stands_behind_the_prompt_it_was_sampled_from(turns: list[Turn]) -> None:
    trajectory = _trajectory(turns)
    wanted = [
        (*prompt, *turn.token_ids)
        for prompt, turn in zip(trajectory.prompts(), turns, strict=True)
        if turn.token_ids
    ]
    rows = [tuple(row.token_ids.tolist()) for row in samples(trajectory)]
    assert all(any(row[: len(w)] == w for row in rows) for w in wanted)


def test_a_fork_begins_a_sample_whose_context_is_not_trained() -> None:
    turns = [
        Turn((1, 2), (3, 4), (-0.1, -0.2), 0),
        Turn((5,), (6,), (-0.3,), 1),
        Turn((1, 2, 6, 7), (8,), (-0.4,), 1, forked=True),
    ]
    first, second = samples(_trajectory(turns))
    assert first.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert first.loss_mask.tolist() == [False, False, True, True, False, True]
    assert first.versions.tolist() == [-1, -1, 0, 0, -1, 1]
    assert second.token_ids.tolist() == [1, 2, 6, 7, 8]
    assert second.loss_mask.tolist() == [False] * 4 + [True]


def test_no_turns_no_samples() -> None:
    assert samples(_trajectory([])) == []
    assert samples(_trajectory([Turn((1, 2), (), (), 0)])) == []
