"""Cond and Batch: rows travel together, mistakes are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.core.types import Batch, Cond, Losses


def cond(*rows: float) -> Cond:
    values = torch.tensor(rows, dtype=torch.float32)
    return Cond({"emb": values.view(-1, 1).expand(-1, 3), "ids": values.long()})


def rows(c: Cond) -> list[int]:
    assert c["emb"][:, 0].long().tolist() == c["ids"].tolist()
    return c["ids"].tolist()


def test_row_operations() -> None:
    c = cond(0, 1, 2)
    assert c.bsz == 3
    assert rows(c.slice(1, 3)) == [1, 2]
    assert rows(c.index([2, 0])) == [2, 0]
    assert rows(c.index(torch.tensor([1, 1]))) == [1, 1]
    assert rows(c.repeat(2)) == [0, 0, 1, 1, 2, 2]
    assert rows(Cond.cat([c, cond(7)])) == [0, 1, 2, 7]


def test_to_casts_floats_only() -> None:
    c = cond(1, 2).to(dtype=torch.float64)
    assert c["emb"].dtype == torch.float64
    assert c["ids"].dtype == torch.int64


def test_get_of_a_missing_tensor_is_none() -> None:
    assert cond(1).get("pooled") is None
    assert cond(1).get("ids") is not None


def test_batch_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one batch size.*'a': 1.*'b': 2"):
        Cond({"a": torch.zeros(1), "b": torch.zeros(2)})


def test_cat_needs_the_same_keys() -> None:
    with pytest.raises(ValueError, match="same keys"):
        Cond.cat([Cond({"a": torch.zeros(1)}), Cond({"b": torch.zeros(1)})])


def test_batch_says_what_it_has() -> None:
    batch = Batch(cond(0, 1), cond(0, 0), (1, 2, 2), x0=torch.zeros(2, 1, 2, 2))
    assert batch.bsz == 2
    assert batch.has() == {"cond", "null", "x0", "real"}
    more = Batch(cond(0), cond(0), (1,), noise=torch.zeros(1, 1), extra={"win": torch.zeros(1)})
    assert more.has() == {"cond", "null", "noise", "win"}


def test_real_samples_are_the_discriminator_s_own_where_it_has_some() -> None:
    batch = Batch(cond(0, 1), cond(0, 0), (1,), x0=torch.zeros(2, 1))
    assert batch.real == (batch.x0, batch.cond)
    own = (torch.ones(2, 1), cond(2, 3))
    assert replace(batch, gan=own).real == own
    assert replace(batch, gan=own, x0=None).has() == {"cond", "null", "real"}


def test_prompt_dropout_takes_the_null_condition_in_its_rows_alone() -> None:
    batch = Batch(cond(1, 2, 3), cond(7, 8, 9), (1,)).nulled(torch.tensor([False, True, True]))
    assert rows(batch.cond) == [1, 8, 9]
    assert rows(batch.null) == [7, 8, 9]


def test_a_further_term_is_added_with_its_weight() -> None:
    total = torch.tensor(10.0, requires_grad=True)
    losses = Losses(total, {"a": torch.tensor(1.0)}).plus(0.5, torch.tensor(4.0), b=total)
    assert losses.total.item() == 12.0
    assert {name: value.item() for name, value in losses.logs.items()} == {"a": 1.0, "b": 10.0}
    assert not losses.logs["b"].requires_grad
