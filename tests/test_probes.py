"""Probes and the HEAR interface, where several notebooks meet: a published layout, a module asked from outside, literal re-computations."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb import hear
from avnb.answers import ask, difference, each_item, gather, ranked, results, splits
from avnb.duals import DualEncoder
from avnb.mvit import audio_tower, video_tower
from avnb.probes import fit_knn, knn_probe, linear_probe


@pytest.mark.quick
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_ranked_is_what_a_loop_says(rows):
    "Items drawn several times, ties, one kind alone: average precision and the ROC area against a literal loop."
    s, y, w = (np.array(c) for c in zip(*rows, strict=True))
    y = y.astype(int)
    ap, auc = (x[0] for x in ranked(s.astype(float), y, w[None]))
    s, y = s.repeat(w), y.repeat(w)
    if not y.sum():
        assert np.isnan(ap) and np.isnan(auc)
        return
    literal = 0.
    for level in sorted(set(s.tolist()), reverse=True):
        above = s >= level
        literal += y[s == level].sum()/y.sum()*y[above].mean()
    assert ap == pytest.approx(literal)
    if y.all(): assert np.isnan(auc)
    else: assert auc == pytest.approx(np.mean([(a > b) + (a == b)/2 for a in s[y == 1] for b in s[y == 0]]))


@pytest.mark.quick
@settings(max_examples=40, deadline=None)
@given(st.integers(3, 7), st.integers(0, 3), st.randoms())
def test_every_item_is_asked_once_and_never_learnt_from(k, windows, random):
    n = 4*k
    files = [i for i in range(n) for _ in range(1 + windows)]
    random.shuffle(files)
    items = gather(np.random.default_rng(0).normal(size=(len(files), 3)), [f % 2 for f in files], [f % k for f in files], files=files, vote="softmax")
    asked = []
    for _, train, valid, test in splits(items.fold):
        assert not set(test) & (set(train) | set(valid)) and not set(train) & set(valid) and len(train) + len(valid) + len(test) == n
        assert len({items.fold[i] for i in test}) == len({items.fold[i] for i in valid}) == 1
        rows = {i for part in (train, valid) for i in np.flatnonzero(np.isin(items.item, part))}
        assert not {items.ids[items.item[r]] for r in rows} & {items.ids[i] for i in test}
        asked += test.tolist()
    assert sorted(asked) == list(range(n))


def test_order_of_rows_changes_nothing():
    rng = np.random.default_rng(0)
    y = np.arange(45) % 3
    x, fold, turn = rng.normal(size=(3, 5))[y] + rng.normal(size=(45, 5)), np.arange(45) // 3 % 3, rng.permutation(45)
    for probe in (linear_probe, knn_probe):
        one, two = probe(x, y, fold), probe(gather(x[turn], y[turn], fold[turn], ids=turn.tolist()))
        at = {i: n for n, i in enumerate(two.ids)}
        assert np.allclose(one.scores[0], two.scores[0][[at[i] for i in one.ids]], atol=1e-4)
        assert results(one)["metrics"]["top1"]["value"] == results(two)["metrics"]["top1"]["value"]


@pytest.mark.quick
def test_neighbours_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    x, y, q = rng.normal(size=(20, 4)), rng.integers(0, 3, 20), rng.normal(size=(6, 4))
    part = gather(x, y, np.arange(20) % 3).part(np.arange(20))
    for k in (1, 4, 50):
        found = fit_knn(part, "class", 3, k)(q)
        for row, p in zip(q, found, strict=True):
            near = sorted(range(20), key=lambda i: -(x[i] @ row)/np.linalg.norm(x[i])/np.linalg.norm(row))[:k]
            assert p == pytest.approx([np.mean(y[near] == c) for c in range(3)], abs=1e-4)


@pytest.mark.quick
def test_pairing_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    x = (2*y - 1)[:, None] + 2*rng.normal(size=(300, 1))
    sign = lambda shift: lambda *_: (lambda x: np.stack([-x[:, 0] - shift, x[:, 0] + shift], 1), {})
    a, b = (ask(gather(x, y, np.arange(300) % 3), sign(s), probe=str(s)) for s in (0, .3))
    wide = [results(p)["metrics"]["top1"] for p in (a, b)]
    apart = difference(a, b)
    assert apart["hi"] - apart["lo"] < min(w["hi"] - w["lo"] for w in wide)
    assert apart["value"] == pytest.approx(each_item(a).mean() - each_item(b).mean(), abs=1e-4)


def test_hear_of_the_published_towers_layout(tmp_path):
    "A tower of the published architecture, saved as published, asked by a stranger at HEAR's own step."
    from avnb.published import save_lssd
    torch.manual_seed(0)
    config = save_lssd(DualEncoder(video_tower("toy"), audio_tower("toy")), tmp_path)
    for path in (config, tmp_path/"checkpoint.pt"):
        model = hear.load_model(path)
        model.hop_ms = 500.
        assert hear.check_hear(model, (1.07,)) == []
    sounds = 2*torch.rand(3, 100_000) - 1
    alone = hear.get_scene_embeddings(sounds[1:2], model)
    assert torch.equal(alone, hear.get_scene_embeddings(sounds, model)[1:2])


@pytest.mark.quick
def test_hear_steps_do_not_drift():
    "A step that is no whole number of samples: the last stamp of a long file is where it should be."
    model = hear.load_model()
    model.hop_ms, begins = 1000/30.1, []
    model._embed = lambda sound, at: begins.append(at) or torch.zeros(len(at), 2)
    _, ms = model.stamps(torch.zeros(48_000*600))
    assert (ms - torch.arange(len(ms), dtype=torch.float64)*model.hop_ms).abs().max() < .02 and begins[0][-1] == round((len(ms) - 1)*model.hop_ms*48)
