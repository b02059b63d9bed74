"""Max-mean and its kin against the definition in float64, over sizes, masks, ties and blocks that no example would think of."""
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb.heads import _draw_pairs, _thin, pair_scores
from avnb.similarity import max_mean, plan_tile, volume
from avnb.timing import gradient_error, pair_step, peak_memory, step


def definition(audio, image, keep):
    "Scores and pressure as they are defined, with the whole volume at hand."
    S, k = torch.einsum("atd,vpd->avtp", audio, image), keep[:, None].to(audio.dtype)
    scores = (S.max(-1).values * k).sum(-1) / k.sum(-1)
    return scores, (S.clamp(-20, 0) ** 2 * k[..., None]).sum() / (k.sum() * S.shape[1] * S.shape[3])


def error(ours, true):
    scale = true.norm()
    return ((ours.double() - true).norm() / (scale if scale > 0 else 1)).item()


sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 13), st.integers(1, 19), st.integers(1, 33))


@pytest.mark.quick
@settings(max_examples=150, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 2**20), ties=st.booleans(), masked=st.booleans(), spread=st.sampled_from([0.3, 1.0, 5.0]),
       tile=st.sampled_from([None, (1, 1), (2, 3), (100, 1), 0.001]), sides=st.sampled_from(["both", "audio", "image"]))
def test_equals_the_definition(size, seed, ties, masked, spread, tile, sides):
    A, V, T, P, D = size
    draw = torch.Generator().manual_seed(seed)
    make = (lambda *s: torch.randint(-3, 4, s, generator=draw).float()) if ties else (lambda *s: spread * torch.randn(s, generator=draw))
    audio, image, keep = make(A, T, D), make(V, P, D), torch.ones(A, T, dtype=torch.bool)
    if masked:
        keep = torch.rand(A, T, generator=draw) > 0.5
        keep[torch.arange(A), torch.randint(T, (A,), generator=draw)] = True
    weight = torch.randn(V, A, generator=draw).T  # not contiguous, as a transposed loss gives it
    exact = [x.double().requires_grad_() for x in (audio, image)]
    scores, p = definition(*exact, keep)
    true = torch.autograd.grad((scores * weight).sum() + 2 * p, exact)
    # where float32 cannot tell the best patch from the second the gradient may rightly go to the other one
    top = torch.einsum("atd,vpd->avtp", *(x.detach() for x in exact)).topk(min(2, P), -1).values
    clear = ties or P == 1 or bool(((top[..., 0] - top[..., 1]) > 1e-5 * (1 + top[..., 0].abs())).all())

    ours = [x.clone().requires_grad_(sides in ("both", name)) for x, name in ((audio, "audio"), (image, "image"))]
    if masked:  # what padding holds must not matter
        ours[0] = audio.masked_fill(~keep[..., None], torch.nan).requires_grad_(sides != "image")
    got, q = max_mean(*ours, keep if masked else None, pressure=True, tile=tile)
    bound = 5e-7 if ties else 1e-6 * (1 + D**0.5)  # a score that cancels loses digits in any form
    assert error(got, scores.detach()) < bound and error(q, p.detach()) < bound
    loss = (got * weight).sum() + 2 * q
    for x, g, name in zip(ours, true, ("audio", "image"), strict=True):
        if not x.requires_grad: continue
        found = torch.autograd.grad(loss, x, retain_graph=True)[0]
        if clear: assert error(found, g) < 5e-7, name
        if masked and name == "audio": assert not found[~keep].any()
    assert torch.equal(max_mean(*(x.detach() for x in ours), keep if masked else None, tile=tile), got.detach())


@pytest.mark.quick
@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=sizes, seed=st.integers(0, 2**20))
def test_each_pair_is_scored_by_itself(size, seed):
    A, V, T, P, D = size
    draw = torch.Generator().manual_seed(seed)
    audio, image = torch.randn(A, T, D, generator=draw).double(), torch.randn(V, P, D, generator=draw).double()
    scores = max_mean(audio, image)
    a, v = seed % A, seed % V
    torch.testing.assert_close(scores[a, v], volume(audio[a], image[v]).amax(1).mean())
    rows, columns = torch.randperm(A, generator=draw), torch.randperm(V, generator=draw)
    torch.testing.assert_close(max_mean(audio[rows], image[columns]), scores[rows][:, columns])
    # the order of moments and patches says nothing
    torch.testing.assert_close(max_mean(audio[:, torch.randperm(T, generator=draw)], image[:, torch.randperm(P, generator=draw)]), scores)


@pytest.mark.quick
@settings(max_examples=200, deadline=None, derandomize=True)
@given(A=st.integers(1, 5000), V=st.integers(1, 5000), entries=st.integers(1, 10**6), budget=st.integers(1, 2**28))
def test_blocks_keep_to_their_budget(A, V, entries, budget):
    a, v = plan_tile(A, V, entries, budget)
    assert 1 <= a <= A and 1 <= v <= V
    assert a * v * entries * 4 <= budget or (a, v) == (1, 1)


@pytest.mark.quick
def test_gradients_repeat_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    audio, image = torch.randn(9, 50, 32, generator=draw).requires_grad_(), torch.randn(9, 25, 32, generator=draw).requires_grad_()
    once, again = (torch.autograd.grad(sum(x.sum() for x in max_mean(audio, image, pressure=True)), (audio, image)) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    draw = torch.Generator().manual_seed(0)
    audio, image = torch.randn(8, 50, 64, generator=draw).to(dtype).requires_grad_(), torch.randn(8, 49, 64, generator=draw).to(dtype).requires_grad_()
    everything = torch.ones(8, 50, dtype=torch.bool)
    scores, p = definition(audio.double(), image.double(), everything)
    got, q = max_mean(audio, image, pressure=True)
    assert got.dtype == q.dtype == torch.float32
    assert error(got, scores.detach()) < 1e-6 and error(q, p.detach()) < 1e-6
    assert error(max_mean(audio, image), scores.detach()) < 1e-4
    for x, g in zip(torch.autograd.grad(max_mean(audio, image).sum(), (audio, image)), torch.autograd.grad(scores.sum(), (audio, image)), strict=True):
        assert x.dtype == dtype and error(x, g.double()) < 0.15  # patches that round alike may be chosen either way


def test_five_thousand_pairs_stream():
    draw = torch.Generator().manual_seed(0)
    audio, image = torch.randn(5000, 2, 8, generator=draw), torch.randn(5000, 3, 8, generator=draw)
    with torch.no_grad(): scores = max_mean(audio, image)
    assert scores.shape == (5000, 5000)
    for a, v in ((0, 0), (17, 4999), (4999, 17)):
        torch.testing.assert_close(scores[a, v], volume(audio[a], image[v]).amax(1).mean())


def test_memory_grows_with_the_batch_not_its_square():
    assert peak_memory(step, "tiled", (128, 50, 64, 32), True) < 70 * 2**20  # the volume alone has 210 MB
    assert gradient_error("tiled", (16, 50, 49, 64), True)[0] < 5e-7


AGGREGATES, PRESSURES, SEED, PAIRS = ("max_mean", "max_max", "mean_mean", "paired"), (None, "exact", "sampled", "pairs"), 5, 7


def one_pair(sound, picture, heads, pool, aggregate):
    "A score and all heads' products, of one clip without its padding (T, D) and one image (P, D); of several that tie, the first counts: moment, patch, head."
    S = torch.stack([x @ y.T for x, y in zip(sound.chunk(heads, 1), picture.chunk(heads, 1), strict=True)])
    V = S if pool == "max" else S.sum(0, keepdim=True)
    moments = V.permute(1, 2, 0).flatten(1).max(1).values  # (T,)
    patches = V.permute(2, 1, 0).flatten(1).max(1).values  # (P,)
    score = {"max_mean": moments.mean, "max_max": lambda: moments.max(0).values, "mean_mean": V.max(0).values.mean, "paired": lambda: (moments.mean() + patches.mean()) / 2}
    return score[aggregate](), S


def slowly(audio, image, keep, heads, pool, aggregate, pressure):
    "What `pair_scores` must give, one pair at a time."
    A, (V, P, _) = len(audio), image.shape
    pairs = [[one_pair(x[k], y, heads, pool, aggregate) for y in image] for x, k in zip(audio, keep, strict=True)]
    scores = torch.stack([torch.stack([score for score, _ in row]) for row in pairs])
    counts, pressed = keep.sum() * P * heads, [[S.clamp(-20, 0).square() for _, S in row] for row in pairs]
    if pressure == "exact": return scores, sum(x.sum() for row in pressed for x in row) / (counts * V)
    if pressure == "pairs": return scores, sum(pressed[a][v].sum() for a, v in _draw_pairs(A, V, PAIRS, SEED, (0, A))) * A / PAIRS / counts
    if pressure is None: return scores, None
    numbers = [torch.arange(n.shape[1]).double().expand(n.shape[:2])[..., None] for n in (audio, image)]
    moments, patches, _, each = _thin(*numbers, None, PAIRS, SEED, (0, A))
    total = 0
    for a, t in enumerate(moments[..., 0].long()):
        place = [keep[a, :i].sum() for i in t.tolist() if keep[a, i]]  # where the moment stands among those kept
        for v, p in enumerate(patches[..., 0].long()): total = total + sum(pressed[a][v][:, i, p].sum() for i in place)
    return scores, total * each / (counts * V)


@pytest.mark.quick
@pytest.mark.parametrize("aggregate", AGGREGATES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3)), seed=st.integers(0, 2**20), ties=st.booleans(),
       masked=st.booleans(), tile=st.sampled_from([None, (1, 1), (2, 3), (3, 1), 0.0005]), sides=st.sampled_from(["both", "both", "audio", "image"]))
def test_heads_equal_the_definition(aggregate, size, seed, ties, masked, tile, sides):
    A, V, T, P, D = size
    draw = torch.Generator().manual_seed(seed)
    make = (lambda *s: torch.randint(-3, 4, s, generator=draw).double()) if ties else (lambda *s: 3 * torch.randn(s, generator=draw, dtype=torch.double))
    audio, image, keep = make(A, T, 6 * D), make(V, P, 6 * D), torch.ones(A, T, dtype=torch.bool)
    if masked:
        keep = torch.rand(A, T, generator=draw) > 0.5
        keep[torch.arange(A), torch.randint(T, (A,), generator=draw)] = True
    weight = torch.randn(V, A, generator=draw, dtype=torch.double).T
    for heads, pool, pressure in [(k, pool, p) for k in (1, 2, 3) for pool in ("max", "sum") for p in PRESSURES]:
        exact = [x.clone().requires_grad_() for x in (audio, image)]
        scores, p = slowly(*exact, keep, heads, pool, aggregate, pressure)
        true = torch.autograd.grad((scores * weight).sum() + (0 if p is None else 2 * p), exact)
        choices = dict(heads=heads, pool=pool, aggregate=aggregate, pressure=pressure, pairs=PAIRS, seed=SEED, tile=tile)
        for dtype, bound in ((torch.double, 1e-11), (torch.float, 1e-5)):
            ours = [x.to(dtype).requires_grad_(sides in ("both", name)) for x, name in ((audio, "audio"), (image, "image"))]
            if masked: ours[0] = audio.to(dtype).masked_fill(~keep[..., None], torch.nan).requires_grad_(sides != "image")  # what padding holds must not matter
            got, q = pair_scores(*ours, keep if masked else None, **choices)
            assert got.dtype == dtype and error(got, scores.detach()) < bound
            assert (q is None) == (p is None) and (q is None or error(q, p.detach()) < bound)
            for x, g, name in zip(ours, true, ("audio", "image"), strict=True):
                if not x.requires_grad: continue
                found = torch.autograd.grad((got * weight).sum() + (0 if q is None else 2 * q), x, retain_graph=True)[0]
                if dtype == torch.double or ties: assert error(found, g) < bound, (heads, pool, pressure, name)  # float32 may rightly prefer another of two within rounding
                if masked and name == "audio": assert not found[~keep].any()


@pytest.mark.quick
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_half_precision(aggregate, dtype):
    draw = torch.Generator().manual_seed(0)
    audio, image, keep = torch.randn(6, 20, 64, generator=draw).to(dtype), torch.randn(5, 30, 64, generator=draw).to(dtype), torch.rand(6, 20, generator=draw) > 0.3
    for heads, pool, pressure in [(k, pool, p) for k in (1, 2) for pool in ("max", "sum") for p in PRESSURES]:
        wide = [x.double().requires_grad_() for x in (audio, image)]
        choices = dict(heads=heads, pool=pool, aggregate=aggregate, pressure=pressure, seed=1)
        (scores, p), ours = pair_scores(*wide, keep, **choices), [x.clone().requires_grad_() for x in (audio, image)]
        got, q = pair_scores(*ours, keep, **choices)
        assert got.dtype == torch.float32 and error(got, scores.detach()) < 1e-3 and (q is None or error(q, p.detach()) < 1e-5)
        for x, g in zip(torch.autograd.grad(got.sum(), ours), torch.autograd.grad(scores.sum(), wide), strict=True):
            assert x.dtype == dtype and error(x, g) < 0.15


@pytest.mark.quick
def test_heads_repeat_bit_for_bit_and_leave_the_generators_alone():
    draw = torch.Generator().manual_seed(0)
    pair = torch.randn(9, 20, 24, generator=draw).requires_grad_(), torch.randn(9, 25, 24, generator=draw).requires_grad_()
    for aggregate, pressure in zip(AGGREGATES, ("exact", "sampled", "pairs", "exact"), strict=True):
        before, found = torch.get_rng_state(), []
        for _ in range(2):
            scores, p = pair_scores(*pair, heads=3, aggregate=aggregate, pressure=pressure, pairs=9, seed=3)
            found.append([scores, p, *torch.autograd.grad(scores.exp().sum() + p, pair)])
        assert all(map(torch.equal, *found)) and torch.equal(before, torch.get_rng_state())
    assert pair_scores(*pair, pressure="sampled", pairs=9, seed=3)[1] != pair_scores(*pair, pressure="sampled", pairs=9, seed=4)[1]


def test_heads_hold_blocks_not_volumes():
    for aggregate in ("mean_mean", "paired"):  # one head's volume alone has 210 MB
        assert peak_memory(pair_step, (128, 50, 64, 32), dict(heads=2, aggregate=aggregate, pressure="exact")) < 100 * 2**20, aggregate


JOB = """
import json, os, sys
import torch, torch.distributed as dist
from avnb.heads import pair_scores
from avnb.losses import info_nce
from avnb.processes import gather
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
if world > 1: dist.init_process_group("gloo")
torch.manual_seed(0)
n, share = 7, [slice(0, 3), slice(3, 7)] if world > 1 else [slice(0, 7)]  # unequal shares
a, v, keep = torch.randn(n, 5, 6, dtype=torch.double), torch.randn(n, 9, 6, dtype=torch.double), torch.rand(n, 5) < .7
keep[:, 0] = True
wa, wv, part, found = torch.nn.Linear(6, 8).double(), torch.nn.Linear(6, 8).double(), share[rank], {}
params = [*wa.parameters(), *wv.parameters()]
for choices in json.loads(sys.argv[2]):
    scores, p = pair_scores(wa(a[part]), gather(wv(v[part]), world), keep[part], **choices, pairs=20, seed=3, span=(part.start, n))
    scores, kept = gather(scores, world), keep[part].sum().double()
    if p is not None: p = gather((p * kept)[None], world).sum() / gather(kept[None], world).sum()
    loss = info_nce(scores, 2.) + (0 if p is None else .15 * p)
    for w in params: w.grad = None
    loss.backward()
    if world > 1:
        for w in params: dist.all_reduce(w.grad); w.grad /= world
    found[str(choices)] = {"loss": loss.item(), "grads": [g for w in params for g in w.grad.flatten().tolist()]}
if rank == 0: json.dump(found, open(sys.argv[1], "w"))
if world > 1: dist.barrier(); dist.destroy_process_group()
"""


def test_two_processes_give_one_batch(tmp_path):
    script, found = tmp_path / "job.py", {}
    script.write_text(JOB)
    ways = json.dumps([dict(heads=k, pool=pool, aggregate=g, pressure=p) for k in (1, 2, 4) for pool in ("max", "sum") for g in AGGREGATES for p in PRESSURES])
    for world, start in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"])):
        out = tmp_path / f"{world}.json"
        subprocess.run([sys.executable, *start, str(script), str(out), ways], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        found[world] = json.loads(out.read_text())
    assert len(found[1]) == len(json.loads(ways))
    for way, one in found[1].items():
        two = found[2][way]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6), way
        assert one["grads"] == pytest.approx(two["grads"], rel=1e-6, abs=1e-9), way
        assert max(map(abs, one["grads"])) > 1e-3, way
