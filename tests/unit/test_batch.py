"""The plan and the packing of a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateset_ray.errors import LearnerError
from stateset_ray.learner.batch import Item, pack, plan
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
        np.where(chosen, 0, -1).astype(np.int32),
    )


def _plan(lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    return plan([Item(length) for length in lengths], ranks, budget)


@given(_LENGTHS, st.integers(1, 5), st.integers(64, 200))
def test_a_plan_holds_every_sample_once_within_the_budget(
    lengths: list[int], ranks: int, budget: int
) -> None:
    planned = _plan(lengths, ranks, budget)
    assert len(planned) == ranks
    assert sorted(i for rank in planned for batch in rank for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for rank in planned for batch in rank)
    assert len({len(rank) for rank in planned}) == 1
    assert planned == _plan(lengths, ranks, budget)
    # Some rank needs its last micro-batch: none is empty everywhere.
    assert all(any(rank[k] for rank in planned) for k in range(len(planned[0])))


@given(_LENGTHS, st.integers(1, 5))
def test_ranks_are_balanced_to_within_one_sample(lengths: list[int], ranks: int) -> None:
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in _plan(lengths, ranks, 64)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_sample_beyond_the_budget_is_refused_with_what_to_do() -> None:
    with pytest.raises(LearnerError, match="micro_batch_tokens"):
        _plan([3, 101], 1, 100)


_GROUPS = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(1, 24), min_size=1, max_size=9)), max_size=8
)
"""Of each group: the prefix, and how much longer each of its samples is."""


def _items(groups: list[tuple[int, list[int]]]) -> list[Item]:
    return [Item(prefix + own, g, prefix) for g, (prefix, owns) in enumerate(groups) for own in owns]


def _cost(items: list[Item], batch: list[int]) -> int:
    """Tokens that a micro-batch computes: each group's prefix once."""
    prefixes = {items[i].group: items[i].prefix for i in batch}
    return sum(prefixes.values()) + sum(items[i].tokens - items[i].prefix for i in batch)


@given(_GROUPS, st.integers(1, 4), st.integers(64, 200))
def test_a_plan_of_groups_fits_the_budget_with_each_prefix_once(
    groups: list[tuple[int, list[int]]], ranks: int, budget: int
) -> None:
    items = _items(groups)
    planned = plan(items, ranks, budget)
    assert sorted(i for rank in planned for batch in rank for i in batch) == list(range(len(items)))
    assert all(_cost(items, batch) <= budget for rank in planned for batch in rank if batch)
    assert len({len(rank) for rank in planned}) == 1


def test_a_group_that_fits_is_never_torn_apart_on_one_rank() -> None:
    items = _items([(30, [4] * 8), (20, [10] * 4), (0, [50])])
    [batches] = plan(items, 1, 64)
    for group in range(2):
        assert sum(any(items[i].group == group for i in batch) for batch in batches) == 1


def test_a_group_larger_than_a_fair_share_is_cut_for_the_other_ranks() -> None:
    planned = plan(_items([(10, [20] * 8)]), 2, 500)
    sizes = [sum(len(batch) for batch in rank) for rank in planned]
    assert min(sizes) >= 3


def test_no_samples_no_micro_batches() -> None:
    assert plan([], 2, 10) == [[], []]


def test_logits_are_taken_one_before_each_masked_token() -> None:
    batch = pack([_sample([7, 8, 9], [0, 1, 1], -0.5), _sample([4, 5, 6, 3], [0, 0, 1, 0], -0.25)])
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5, 6, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.segments == ((3, -1), (4, -1))
    assert batch.logit_indices.tolist() == [0, 1, 4]
    assert batch.target_ids.tolist() == [8, 9, 6]
    assert batch.sampler_logprobs.tolist() == [-0.5, -0.5, -0.25]
    assert batch.advantages.tolist() == [2.0, 2.0, 2.0]
    assert (batch.tokens, batch.padding) == (7, False)


def test_a_shared_prefix_lies_there_once_and_predicts_each_first_token() -> None:
    a, b = _sample([5, 6, 7, 8], [0, 0, 1, 1]), _sample([5, 6, 9, 4, 3], [0, 0, 0, 1, 0])
    alone = _sample([1, 2], [0, 1])
    batch = pack([a, alone, b], groups=["g", "h", "g"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1]]
    assert batch.segments == ((2, -1), (2, 0), (3, 0), (2, -1))
    assert batch.logit_indices.tolist() == [1, 2, 4, 7]
    assert batch.target_ids.tolist() == [7, 8, 4, 2]
    assert batch.rows.tolist() == [0, 0, 1, 2]
    assert (batch.samples, batch.tokens, batch.unshared) == (3, 9, 11)


def test_weights_belong_to_the_sample() -> None:
    batch = pack([_sample([5, 6, 7], [0, 1, 1]).credited([3.0], 0.5), _sample([5, 6], [0, 1])])
    assert batch.weights.tolist() == [0.5, 0.5, 1.0]
    assert batch.advantages.tolist() == [3.0, 3.0, 2.0]


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
