from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfill.blocks import make_plan, rows_from_mask
from fastfill.config import PrefillConfig
from fastfill.kernels import Bounds, sparse_ffn


def rule(block, head, least, tail=0):
    return PrefillConfig(block_size=block, dense_head=head, min_tokens=least, dense_tail=tail)


def expected_sparse(rows, tokens, block, head, least, tail=0):
    """Independent: token by token. A token is sparse if its whole block is in the call, behind the head and before the tail."""
    sparse = set()
    for index, (first, last, position) in enumerate(rows):
        if last - first < least:
            continue
        here = range(position, position + last - first)  # absolute positions in this call
        for p in here:
            whole = range(p // block * block, p // block * block + block)
            if whole[0] in here and whole[-1] in here and whole[0] >= head and whole[-1] < here.stop - tail:
                sparse.add(index * tokens + first + p - position)
    return sparse


@st.composite
def calls(draw):
    tokens = draw(st.integers(1, 60))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, tokens))
        last = draw(st.integers(first, tokens))
        rows.append((first, last, 0 if first else draw(st.integers(0, 40))))
    return rows, tokens, draw(st.integers(1, 12)), draw(st.integers(0, 30)), draw(st.integers(1, 20))


@given(calls(), st.integers(0, 30))
def test_the_plan_equals_a_token_by_token_reading_of_the_rule(call, tail):
    rows, tokens, block, head, least = call
    plan = make_plan(rows, tokens, rule(block, head, least, tail))
    expected = expected_sparse(rows, tokens, block, head, least, tail)
    if plan is None:
        assert not expected
        return
    assert {row for span in plan.spans for row in range(span.start, span.stop)} == expected
    assert plan.sparse_tokens == len(expected) == plan.blocks * block
    assert plan.valid == sum(last - first for first, last, _ in rows)
    for span in plan.spans:
        assert (span.stop - span.start) % block == 0
        first, _, position = rows[span.start // tokens]
        assert span.first == (span.start // tokens * tokens + first if position == 0 else None)


@given(st.integers(1, 12), st.integers(0, 30), st.integers(1, 40), st.integers(0, 30))
def test_the_shortest_prompt_is_the_first_with_a_sparse_token(block, head, least, tail):
    tokens = next(n for n in range(1, 200) if expected_sparse([(0, n, 0)], n, block, head, least, tail))
    assert rule(block, head, least, tail).shortest_prompt == tokens


@given(calls(), st.integers(0, 5))
def test_every_row_is_in_one_block_with_its_neurons(call, kept):
    rows, tokens, block, head, least = call
    plan = make_plan(rows, tokens, rule(block, head, least))
    if plan is None:
        return
    total, neurons = len(rows) * tokens, 5
    sparse = [any(span.start <= row < span.stop for span in plan.spans) for row in range(total)]
    selection = torch.stack([torch.randperm(neurons)[:kept].sort().values for _ in range(plan.blocks)])
    ids, bounds = plan.with_dense(selection, neurons)
    edges, bounds, taken = list(plan.rows), list(bounds), 0
    assert edges[0] == 0 and edges[-1] == total and len(edges) == len(bounds) and bounds[-1] == len(ids)
    for (start, stop), (a, b) in zip(pairwise(edges), pairwise(bounds), strict=True):
        assert start < stop and len({*sparse[start:stop]}) == 1  # no block mixes the two kinds
        if sparse[start]:
            assert stop - start == block and ids[a:b].tolist() == selection[taken].tolist()
            taken += 1
        else:
            assert ids[a:b].tolist() == [*range(neurons)]
    assert taken == plan.blocks
    x = torch.arange(1.0, total + 1).view(-1, 1)
    cleared = plan.clear_dense(x.clone())
    assert cleared[:, 0].tolist() == [value if keep else 0.0 for value, keep in zip(x[:, 0].tolist(), sparse, strict=True)]
    assert torch.equal(plan.split(cleared), plan.split(x)) and len(plan.split(x)) == sum(sparse)


def test_blocks_of_a_call_by_hand():
    plan = make_plan([(0, 20, 0), (6, 20, 0)], 20, rule(4, 4, 1))
    # Head 0..3, sparse 4..19; then 6 rows of padding with the head 6..9 behind them, sparse 10..17, tail.
    assert list(plan.rows) == [0, 4, 8, 12, 16, 20, 30, 34, 38, 40]
    ids, bounds = plan.with_dense(torch.tensor([[0, 2]] * 4 + [[1, 2]] * 2), 3)
    assert ids.tolist() == [0, 1, 2, *[0, 2] * 4, 0, 1, 2, *[1, 2] * 2, 0, 1, 2]
    assert list(bounds) == [0, 3, 5, 7, 9, 11, 14, 16, 18, 21]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=4), st.data())
def test_rows_from_a_padded_mask(sequences, data):
    """Each sequence: left padding, tokens, right padding; filled up on the right to one width."""
    width = max(sum(s) for s in sequences)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, (left, count, _) in zip(mask, sequences, strict=True):
        row[left : left + count] = 1
    past = data.draw(st.integers(0, width - 1))
    rows = rows_from_mask(mask, past)
    for (first, last, position), (left, count, _) in zip(rows, sequences, strict=True):
        tokens_here = [t for t in range(left, left + count) if t >= past]
        assert last - first == len(tokens_here)
        if tokens_here:
            assert first == tokens_here[0] - past
            assert position == tokens_here[0] - left


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 0, 1]])
def test_a_mask_with_holes_is_not_understood(row):
    assert rows_from_mask(torch.tensor([[1, 1, 1, 1], row]), 0) is None


@pytest.mark.parametrize("past", [0, 2])
def test_a_sequence_without_tokens_has_none(past):
    """The first chunk of a batch with left padding, of a sequence that begins later."""
    rows = rows_from_mask(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), past)
    assert rows == [(0, 4 - past, past), (0, 0, 0)]
    (span,) = make_plan(rows, 4 - past, rule(2, 0, 1)).spans
    assert (span.start, span.stop) == (0, 4 - past)


def test_boundaries_are_checked_when_they_are_made():
    assert Bounds([0, 0, 3]) == (0, 0, 3)
    for wrong in ([], [1, 2], [0, 2, 1]):
        with pytest.raises(ValueError, match="rise from 0"):
            Bounds(wrong)
    x = torch.ones(4, 2)
    weights = [torch.ones(3, 2)] * 3
    for rows, offsets in (
        (Bounds([0, 3]), Bounds([0, 2])),
        (Bounds([0, 4]), Bounds([0, 1])),
        (Bounds([0, 2, 4]), Bounds([0, 2])),
    ):
        with pytest.raises(ValueError, match="boundaries up to"):
            sparse_ffn(x, *weights, torch.tensor([0, 1]), rows=rows, id_offsets=offsets, kernel="torch")
