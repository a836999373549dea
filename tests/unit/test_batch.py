"""The plan and the packing of a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.errors import LearnerError
from stateset_ray.learner.batch import pack, plan
from stateset_ray.types import Sample

_LENGTHS = st.lists(st.integers(1, 64), max_size=40)


def _sample(ids: list[int], mask: list[int], logprob: float = -1.0) -> Sample:
    chosen = np.array(mask, dtype=bool)
    return Sample(
        np.array(ids, dtype=np.int32),
        chosen,
        np.where(chosen, logprob, 0).astype(np.float32),
        chosen.astype(np.float32) * 2,
        np.where(chosen, 0, -1).astype(np.int32),
    )


@given(_LENGTHS, st.integers(1, 5), st.integers(64, 200))
def test_a_plan_holds_every_sample_once_within_the_budget(
    lengths: list[int], ranks: int, budget: int
) -> None:
    planned = plan(lengths, ranks, budget)
    assert len(planned) == ranks
    assert sorted(i for rank in planned for batch in rank for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for rank in planned for batch in rank)
    assert len({len(rank) for rank in planned}) == 1
    assert planned == plan(lengths, ranks, budget)
    # Some rank needs its last micro-batch: none is empty everywhere.
    assert all(any(rank[k] for rank in planned) for k in range(len(planned[0])))


@given(_LENGTHS, st.integers(1, 5))
def test_ranks_are_balanced_to_within_one_sample(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in plan(lengths, ranks, 64)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_sample_beyond_the_budget_is_refused_with_what_to_do() -> None:
    with pytest.raises(LearnerError, match="micro_batch_tokens"):
        plan([3, 101], 1, 100)


def test_no_samples_no_micro_batches() -> None:
    assert plan([], 2, 10) == [[], []]


def test_logits_are_taken_one_before_each_masked_token() -> None:
    batch = pack([_sample([7, 8, 9], [0, 1, 1], -0.5), _sample([4, 5, 6, 3], [0, 0, 1, 0], -0.25)])
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5, 6, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.lengths == (3, 4)
    assert batch.logit_indices.tolist() == [0, 1, 4]
    assert batch.target_ids.tolist() == [8, 9, 6]
    assert batch.sampler_logprobs.tolist() == [-0.5, -0.5, -0.25]
    assert batch.advantages.tolist() == [2.0, 2.0, 2.0]
    assert (batch.tokens, batch.padding) == (7, False)


def test_the_stop_token_stays_in_the_loss_where_it_is_also_the_padding_token() -> None:
    pad = eos = 2
    batch = pack([_sample([5, 6, eos], [0, 1, 1]), _sample([5, pad, 6], [0, 1, 1])])
    assert batch.target_ids.tolist() == [6, eos, pad, 6]


@pytest.mark.parametrize("samples", [[], [_sample([5, 6], [0, 0])]])
def test_nothing_to_learn_is_a_padding_pass_that_counts_nowhere(samples: list[Sample]) -> None:
    batch = pack(samples)
    assert batch.padding
    assert batch.tokens == 0
    assert len(batch.logit_indices) == 1


def test_a_masked_first_token_is_refused() -> None:
    with pytest.raises(LearnerError, match="first token"):
        pack([_sample([5, 6], [0, 1]), _sample([5, 6], [1, 1])])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_sampler_logprob_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(LearnerError, match="sampler logprobs"):
        pack([_sample([5, 6], [0, 1], bad)])
