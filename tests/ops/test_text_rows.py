"""text_to_vision_scores against the formula on whole attention maps in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmeff import ops
from vlmeff.errors import BackendUnavailableError
from vlmeff.ops import attention, text_rows, text_to_vision_scores

# Relative to the largest score; products of half inputs are exact in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def attention_map(q, k, scale, valid, softcap=None):
    """[Hq, L, L] float64: the causal softmax of one sample over its valid keys; rows without a key are 0."""
    queries, keys = q.double(), k.double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    z = scale * queries @ keys.mT
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    n = z.shape[-1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & valid
    return z.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def literal(a, text, vision):
    """The score as the paper writes it, one sum after the other."""
    out = torch.zeros(len(vision), dtype=torch.float64)
    for head in a:
        weight = {
            j: sum(head[j, i] for i in text) + sum(head[i, j] for i in text) - head[j, j]  #
            for j in text
        }
        for place, v in enumerate(vision):
            out[place] += sum(weight[t] * head[t, v] for t in text)
    return out


def official(a, text, vision):
    """The expression of the authors' code: column sums of T2T + T2T^T without the diagonal twice."""
    t2t = a[:, text][:, :, text]
    weight = (t2t + t2t.mT).sum(1) - t2t.diagonal(dim1=1, dim2=2)
    return (weight[:, :, None] * a[:, text][:, :, vision]).sum(1).sum(0)


def sample(seed, *, batch=2, kv_heads=2, group=3, length=13, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, length, dim, generator=g).to(dtype)
    return q, torch.randn(batch, kv_heads, length, dim, generator=g).to(dtype)


def rows(q, text):
    return q.gather(2, text[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


TEXT, VISION = [8, 9, 10, 11, 12], [2, 3, 4, 5, 7]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_score_is_that_of_the_paper_and_of_the_authors_code(dtype, group):
    q, k = sample(group, group=group, dtype=dtype)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    got = text_to_vision_scores(rows(q, text), k, text=text, vision=vision, scale=0.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(2):
        a = attention_map(q[b], k[b], 0.7, torch.ones(13, dtype=torch.bool))
        close(got[b], literal(a, TEXT, VISION), TOLERANCE[dtype])
        close(got[b], official(a, TEXT, VISION), TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_padding_ragged_text_and_any_layout_equal_the_literal_formula(data):
    length, width = data.draw(st.integers(3, 14)), data.draw(st.integers(1, 6))
    q, k = sample(data.draw(st.integers(0, 99)), batch=3, length=length, dim=8)
    nv = data.draw(st.integers(1, length - 1))
    softcap = data.draw(st.sampled_from([None, 1.5]))
    valid = torch.ones(3, length, dtype=torch.bool)
    text, text_valid = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.bool)
    vision, voters = [], []
    for b in range(3):
        order = data.draw(st.permutations(range(length)))
        valid[b, : data.draw(st.integers(0, length - 1))] = False
        vision.append(sorted(order[:nv]))
        voters.append(sorted(order[nv : nv + data.draw(st.integers(0, min(width, length - nv)))]))
        text[b, : len(voters[b])] = torch.tensor(voters[b], dtype=torch.int64)
        text_valid[b, : len(voters[b])] = True
    got = text_to_vision_scores(
        rows(q, text), k, text=text, vision=torch.tensor(vision), scale=0.5, key_valid=valid, text_valid=text_valid,
        softcap=softcap,
    )  # fmt: skip
    for b in range(3):
        a = attention_map(q[b], k[b], 0.5, valid[b], softcap)
        expected = literal(a, [t for t in voters[b] if valid[b, t]], vision[b])
        torch.testing.assert_close(got[b].double(), expected, atol=1e-5, rtol=1e-5)


def test_small_blocks_give_the_same_scores(monkeypatch):
    q, k = sample(3)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    arguments = {"text": text, "vision": vision, "scale": 0.7}
    whole = text_to_vision_scores(rows(q, text), k, **arguments)
    monkeypatch.setattr(text_rows, "_AT_ONCE_BYTES", 0)
    monkeypatch.setattr(attention, "_LOGITS_BLOCK_BYTES", 400)  # one text row at a time
    close(text_to_vision_scores(rows(q, text), k, **arguments), whole.double())


def test_a_sample_does_not_depend_on_its_batch_mates():
    q, k = sample(4, batch=4)
    text, vision = torch.tensor([TEXT] * 4), torch.tensor([VISION] * 4)
    batch = text_to_vision_scores(rows(q, text), k, text=text, vision=vision, scale=0.7)
    for b in range(4):
        one = slice(b, b + 1)
        alone = text_to_vision_scores(rows(q, text)[one], k[one], text=text[one], vision=vision[one], scale=0.7)
        close(alone, batch[one].double())


def test_text_that_stands_before_a_visual_token_gives_it_nothing():
    q, k = sample(5, batch=1)
    text, vision = torch.tensor([[2, 3]]), torch.tensor([[0, 1, 5, 6]])
    got = text_to_vision_scores(rows(q, text), k, text=text, vision=vision, scale=0.7)
    assert got[0, 2:].tolist() == [0.0, 0.0]
    assert bool((got[0, :2] > 0).all())


def test_what_is_too_long_for_one_pass_is_done_by_ops_that_have_kernels(monkeypatch):
    q, k = sample(6)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    voting = torch.tensor([[True] * len(TEXT), [True] * (len(TEXT) - 1) + [False]])
    key_valid = torch.ones(2, k.shape[2], dtype=torch.bool)
    key_valid[1, :2] = False
    for softcap in (None, 3.0):
        call = {"text": text, "vision": vision, "scale": 0.7, "softcap": softcap}
        call |= {"text_valid": voting, "key_valid": key_valid}
        at_once = text_to_vision_scores(rows(q, text), k, **call)
        with monkeypatch.context() as small, ops.counters() as ran:
            small.setattr("vlmeff.ops.text_rows._AT_ONCE_BYTES", 0)
            in_passes = text_to_vision_scores(rows(q, text), k, **call)
        assert ran["row_logsumexp", "reference"] == ran["attention_column_mass", "reference"] == 2
        torch.testing.assert_close(in_passes, at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_row_that_does_not_vote_hides_its_nan_and_no_text_or_no_sample_is_legal(monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(text_rows, "_AT_ONCE_BYTES", -1)
    q, k = sample(8)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    of_text = rows(q, text)
    voting = torch.ones(2, len(TEXT), dtype=torch.bool)
    voting[1, 3] = False
    call = {"text": text, "vision": vision, "scale": 0.7, "text_valid": voting}
    expected = text_to_vision_scores(of_text, k, **call)
    of_text[1, :, 3] = torch.nan
    close(text_to_vision_scores(of_text, k, **call), expected.double())
    for batch, count in ((2, 0), (0, 5)):
        q_none, k_none = of_text[:batch, :, :count], k[:batch]
        none = text_to_vision_scores(q_none, k_none, text=text[:batch, :count], vision=vision[:batch], scale=0.7)
        assert none.tolist() == [[0.0] * len(VISION)] * batch


@pytest.mark.parametrize("at_once", [True, False])
def test_an_ambient_autocast_changes_nothing(monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(text_rows, "_AT_ONCE_BYTES", -1)
    q, k = sample(9)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    call = {"text": text, "vision": vision, "scale": 0.7}
    expected = text_to_vision_scores(rows(q, text), k, **call)
    with torch.autocast("cpu", torch.bfloat16):
        got = text_to_vision_scores(rows(q, text), k, **call)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_a_choice_of_kernels_is_not_lost_on_the_short_way():
    q, k = sample(6)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    with ops.backend(row_logsumexp="cuda"), pytest.raises(BackendUnavailableError):
        text_to_vision_scores(rows(q, text), k, text=text, vision=vision, scale=0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 4, dtype=torch.int64)}, "text must be"),
        ({"text": torch.zeros(2, 5)}, "text must be int32 or int64"),
        ({"vision": torch.zeros(1, 5, dtype=torch.int64)}, "vision must be"),
        ({"key_valid": torch.ones(2, 13)}, "key_valid must be bool"),
        ({"text_valid": torch.ones(2, 13, dtype=torch.bool)}, "text_valid must be"),
        ({"scale": "1"}, "scale must be a number"),
        ({"text": torch.tensor([[8, 9, 10, 11, 13]] * 2)}, r"text must lie in \[0, 13\), got values from 8 to 13"),
        ({"vision": torch.tensor([[-1, 2, 3]] * 2)}, r"vision must lie in \[0, 13\), got values from -1 to 3"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_wrong_argument_is_named(change, message):
    q, k = sample(7)
    text, vision = torch.tensor([TEXT] * 2), torch.tensor([VISION] * 2)
    with pytest.raises((ValueError, TypeError), match=message):
        text_to_vision_scores(rows(q, text), k, **{"text": text, "vision": vision, "scale": 0.7, **change})
