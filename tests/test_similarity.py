"""Max-mean against the definition in float64, over sizes, masks, ties and blocks that no example would think of."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb.similarity import max_mean, plan_tile, volume
from avnb.timing import gradient_error, peak_memory, step


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
