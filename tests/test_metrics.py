"""Every metric against its definition in plain loops; what must not move it, and what must, over many small sets; what it refuses."""
import math
import statistics
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from avnb.maps import centre_heat, everything
from avnb.metrics import (AtSize, ap_dis, area_matched_iou, avs_each, avs_figures, bootstrap, bootstrap_of, ciou, ciou_each, class_ranks, iiou_each, iiou_figures, localisation_each,
                          localisation_figures, pointing, pointing_each, prompt_heat, prompt_weight, ranks, retrieval, retrieval_figures, retrieval_lots, retrieval_results, segmentation,
                          segmentation_figures, stream_scores)
from avnb.rules import with_baselines

seeds = st.integers(0, 2**20)
many = settings(max_examples=40, deadline=None, derandomize=True)
some = settings(max_examples=15, deadline=None, derandomize=True)


def draw_of(seed): return torch.Generator().manual_seed(seed)


def maps(seed, n=5, h=6, w=7, levels=None):
    "Heat and truth, every truth with a pixel; `levels` makes ties."
    draw = draw_of(seed)
    heat, truth = torch.rand(n, h, w, generator=draw), torch.rand(n, h, w, generator=draw) < 0.3
    truth[:, seed % h, seed % w] = True
    return ((heat * levels).floor() / levels if levels else heat), truth


def odd_maps(seed, n=4, h=3, w=4):
    "The corners: a constant map, a full truth, a truth of one pixel, and maps of few values."
    heat, truth = maps(seed, n, h, w, levels=[2, 3, 50][seed % 3])
    heat[0] = seed % 2
    truth[min(1, n - 1)] = True
    truth[-1] = False; truth[-1, seed % h, seed % w] = True
    return heat, truth


# ---- the definitions, in plain loops ----

def slow_ranks(s):
    better = [sum(x > row[i] for x in row) for i, row in enumerate(s)]
    equal = [sum(x == row[i] for j, x in enumerate(row) if j != i) for i, row in enumerate(s)]
    return [1 + b for b in better], [1 + b + e / 2 for b, e in zip(better, equal, strict=True)], equal


def slow_retrieval(s):
    out = {}
    for way, rows in (("a2v", s), ("v2a", [list(column) for column in zip(*s, strict=True)])):
        best, middle, equal = slow_ranks(rows)
        for name, found in (("", best), ("_mid", middle)):
            out |= {f"{way}/R@{k}{name}": sum(r <= k for r in found) / len(found) for k in (1, 5, 10)}
            out |= {f"{way}/MedR{name}": statistics.median(found), f"{way}/MeanR{name}": sum(found) / len(found)}
        out[f"{way}/ties"] = sum(equal)
    return out | {"ties": out["a2v/ties"] + out["v2a/ties"], "n": len(s)}


def slow_ap(h, g):
    "Sum over the values taken, highest first, of (gain in recall) * precision."
    out, before, total = 0, 0, sum(g)
    for t in sorted(set(h), reverse=True):
        hits, n = sum(bool(b) for a, b in zip(h, g, strict=True) if a >= t), sum(a >= t for a in h)
        out, before = out + (hits - before) / total * hits / n, hits
    return out


def slow_class(s, labels):
    "Of each query: average precision, rank of the best right answer, wrong answers that tie with it."
    out = []
    for i, row in enumerate(s):
        right = [bool(set(labels[i]) & set(other)) for other in labels]
        best = max(x for x, r in zip(row, right, strict=True) if r)
        out.append((slow_ap(row, right), 1 + sum(x > best for x in row), sum(x == best and not r for x, r in zip(row, right, strict=True))))
    return [list(x) for x in zip(*out, strict=True)]


def slow_ciou(p, g): return sum(b for a, b in zip(p, g, strict=True) if a) / (sum(g) + sum(1 for a, b in zip(p, g, strict=True) if a and b == 0))


def above_median(h):
    middle = sorted(h)[(len(h) - 1) // 2]  # the lower of two middles; between them there is no pixel
    assert [v > middle for v in h] == [v > statistics.median(h) for v in h]
    return [v > middle for v in h]


def slow_area(each):
    shares = [sum(e >= k / 20 for e in each) / len(each) for k in range(21)]
    return sum((a + b) / 2 * .05 for a, b in zip(shares, shares[1:], strict=False))


def hottest(h, n):
    chosen = sorted(range(len(h)), key=lambda i: -h[i])[:n]  # sorted is stable: the first of equals
    return [i in chosen for i in range(len(h))]


def slow_iou(p, g): return sum(bool(a and b) for a, b in zip(p, g, strict=True)) / sum(bool(a or b) for a, b in zip(p, g, strict=True))


def slow_best_iou(h, g):
    lo, hi = min(h), max(h)
    return max(slow_iou([v > lo + (hi - lo) * k / 19 for v in h], g) for k in range(20))


def flat(x): return x.double().flatten(1).tolist()


def pooled(x, rows): return [v for i in rows for v in x[i].double().flatten().tolist()]


# ---- retrieval ----

@pytest.mark.quick
@many
@given(seed=seeds, n=st.integers(1, 14), levels=st.sampled_from([1, 2, 5, 1000]))
def test_retrieval_is_its_definition(seed, n, levels):
    draw = draw_of(seed)
    scores = torch.randint(levels, (n, n), generator=draw).float()
    found, slow = retrieval(scores), slow_retrieval(scores.tolist())
    assert set(found) == set(slow) and all(found[k] == pytest.approx(v, abs=1e-12) for k, v in slow.items())
    assert [x.tolist() for x in ranks(scores)] == list(slow_ranks(scores.tolist()))
    labels = [sorted({"abc"[i] for i in torch.randint(3, (1 + seed % 2,), generator=draw)}) for _ in range(n)]  # one class a clip, or up to two
    precision, best, ties = class_ranks(scores, labels)
    slow = slow_class(scores.tolist(), labels)
    torch.testing.assert_close(precision, torch.tensor(slow[0], dtype=torch.float64), atol=1e-9, rtol=0)
    assert [best.tolist(), ties.tolist()] == slow[1:]
    found = retrieval(scores, labels)
    assert found["a2v/class_mAP"] == pytest.approx(sum(slow[0]) / n) and found["a2v/class_R@5"] == sum(r <= 5 for r in slow[1]) / n and found["a2v/class_ties"] == sum(slow[2])


@pytest.mark.quick
@many
@given(seed=seeds, n=st.integers(1, 30), levels=st.sampled_from([2, 5, 1000]))
def test_retrieval_ignores_order_and_scale(seed, n, levels):
    draw = draw_of(seed)
    scores, kind = torch.randint(levels, (n, n), generator=draw).double(), torch.randint(3, (n,), generator=draw)
    result, order = retrieval(scores, kind), torch.randperm(n, generator=draw)
    assert retrieval(scores[order][:, order], kind[order]) == pytest.approx(result, abs=1e-12)  # the pairs in another order
    assert retrieval(scores.sqrt() * 3 - 7, kind) == result  # any rising function
    flipped = retrieval(scores.T, kind)                      # the other direction
    assert {k.replace("a2v", "x").replace("v2a", "a2v").replace("x", "v2a"): v for k, v in flipped.items()} == result
    best, middle, ties = ranks(scores)
    assert (best >= 1).all() and (best + ties <= n).all() and (middle == best + ties / 2).all()
    assert result["a2v/R@1"] <= result["a2v/R@5"] <= result["a2v/R@10"] and result["a2v/R@1_mid"] <= result["a2v/R@1"] <= result["a2v/class_R@1"]
    better = scores + 1e6 * torch.eye(n)                     # every true pair raised above all
    assert retrieval(better)["a2v/R@1"] == retrieval(better)["v2a/MeanR_mid"] == 1
    twice = retrieval(scores.repeat(2, 2))                   # every clip twice: each partner ties with its copy, and is beaten by twice as many
    assert twice["a2v/MeanR"] - 1 == pytest.approx(2 * (result["a2v/MeanR"] - 1)) and twice["a2v/ties"] == 4 * result["a2v/ties"] + 2 * n


def test_retrieval_agrees_with_torchmetrics_where_nothing_ties():
    from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall
    scores, kind = torch.rand(20, 20, generator=draw_of(0)), torch.arange(20) % 4
    query = torch.arange(20).repeat_interleave(20)
    for k in (1, 5, 10): assert RetrievalRecall(top_k=k)(scores.flatten(), torch.eye(20).flatten().long(), query).item() == pytest.approx(retrieval(scores)[f"a2v/R@{k}"])
    assert RetrievalMAP()(scores.flatten(), (kind[:, None] == kind).flatten(), query).item() == pytest.approx(retrieval(scores, kind)["a2v/class_mAP"], abs=1e-6)


@pytest.mark.quick
def test_retrieval_intervals_and_lots():
    kind = torch.arange(40) % 8
    scores = torch.randn(40, 40, generator=draw_of(1)) + 2 * torch.eye(40) + (kind[:, None] == kind)
    found, plain = retrieval_results(scores, kind, [f"clip {i}" for i in range(40)]), retrieval(scores, kind)
    for k, v in found["metrics"].items():
        assert v["value"] == pytest.approx(plain[k], abs=1e-4) and v["n"] == 40
        if not k.endswith("ties"): assert v["lo"] <= v["value"] <= v["hi"], k
    assert {"a2v/R@1", "v2a/R@5", "a2v/MeanR", "a2v/class_mAP", "v2a/class_R@1"} <= {k for k, v in found["metrics"].items() if v.get("lo", 0) < v.get("hi", 0)}
    assert [x["rank_a2v"] for x in found["items"]] == ranks(scores)[0].tolist() and found["items"][3]["id"] == "clip 3"
    assert found == retrieval_results(scores, kind, [f"clip {i}" for i in range(40)])
    lots = retrieval_lots(6, [0, 0, 0, 1, 1, 2])
    every = [retrieval(torch.rand(6, 6, generator=draw_of(i)), [0, 0, 0, 1, 1, 2]) for i in range(400)]
    for k, v in lots.items(): assert sum(x[k] for x in every) / len(every) == pytest.approx(v["value"], abs=.04 * (5 if "Me" in k else 1))
    assert retrieval_figures(torch.zeros(1, 1), ["a"])["a2v/class_mAP"] == {"value": 1, "lo": 1, "hi": 1, "n": 1}  # one clip


# ---- streams ----

class Lazy:
    "Tokens that exist while somebody holds them, and how many tiles did at once."
    alive = most = reads = 0

    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)

    def __getitem__(self, part):
        tile = self.x[part].clone()
        Lazy.alive, Lazy.reads = Lazy.alive + 1, Lazy.reads + 1
        Lazy.most = max(Lazy.most, Lazy.alive)
        weakref.finalize(tile, self.gone)
        return tile

    @staticmethod
    def gone(): Lazy.alive -= 1


@pytest.mark.quick
@some
@given(seed=seeds, clips=st.integers(1, 9), aggregate=st.sampled_from(["max_mean", "paired"]))
def test_streamed_scores_are_the_definition(seed, clips, aggregate):
    draw = draw_of(seed)
    audio, image, keep = torch.randn(7, 3, 4, generator=draw), torch.randn(6, 5, 4, generator=draw), torch.rand(7, 3, generator=draw) < .6
    keep[:, seed % 3] = True
    found = stream_scores(audio, Lazy(image), keep, clips=clips, aggregate=aggregate)
    for a in range(7):
        for v in range(6):
            S = [[sum(x * y for x, y in zip(t, p, strict=True)) for p in image[v].tolist()] for t, k in zip(audio[a].tolist(), keep[a].tolist(), strict=True) if k]
            heard = sum(max(row) for row in S) / len(S)
            seen = sum(max(column) for column in zip(*S, strict=True)) / 5
            assert found[a, v].item() == pytest.approx(heard if aggregate == "max_mean" else (heard + seen) / 2, abs=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("frames", [0, 4])
def test_a_stream_holds_two_tiles(frames):
    shape = (frames, 5, 8) if frames else (5, 8)
    x, y = (torch.randn(150, *shape, generator=draw_of(i)) for i in range(2))
    Lazy.alive = Lazy.most = Lazy.reads = 0
    scores = stream_scores(Lazy(x), Lazy(y), clips=16, time_pool=2)
    assert Lazy.most == 2 and Lazy.alive == 0 and Lazy.reads == 10 + 10 * 10  # pictures are read again for each tile of sounds
    torch.testing.assert_close(scores, stream_scores(x, y, clips=150, time_pool=2), atol=1e-5, rtol=0)
    if frames: torch.testing.assert_close(scores, torch.stack([stream_scores(x[:, f], y[:, f], time_pool=2) for f in range(4)]).mean(0), atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    "The largest tensor that any operation makes, views left out."
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None and out.untyped_storage().data_ptr() != self.given: self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.quick
def test_ranking_makes_nothing_as_large_as_the_scores():
    scores, kind = torch.rand(1500, 1500, generator=draw_of(0)), torch.arange(1500) % 7
    with Largest() as seen:
        seen.given = scores.untyped_storage().data_ptr()
        retrieval(scores, kind)
    assert seen.numbers <= scores.numel() / 10


# ---- places ----

@pytest.mark.quick
@many
@given(seed=seeds, n=st.integers(1, 5))
def test_localisation_is_its_definition(seed, n):
    heat, truth = odd_maps(seed, n)
    H, G = flat(heat), flat(truth)
    each = [slow_ciou(above_median(h), g) for h, g in zip(H, G, strict=True)]
    assert ciou_each(heat, truth).tolist() == pytest.approx(each, abs=1e-12)
    assert ciou(heat, truth) == pytest.approx({"cIoU": sum(e >= .5 for e in each) / n, "AUC": slow_area(each), "mean": sum(each) / n, "n": n}, abs=1e-9)
    assert pointing_each(heat, truth).tolist() == [bool(g[h.index(max(h))]) for h, g in zip(H, G, strict=True)]
    matched = [hottest(h, int(sum(g))) for h, g in zip(H, G, strict=True)]
    assert area_matched_iou(heat, truth) == pytest.approx(sum(slow_iou(p, g) for p, g in zip(matched, G, strict=True)) / n)
    found, adaptive = localisation_each(heat, truth), [slow_ciou(p, g) for p, g in zip(matched, G, strict=True)]
    assert found["adaptive_cIoU"].tolist() == [float(e >= .5) for e in adaptive] and found["adaptive_AUC"].mean().item() == pytest.approx(slow_area(adaptive))
    soft = (torch.rand(truth.shape, generator=draw_of(seed)) * 3).round() / 3 * truth  # annotators who agree in part
    soft[:, seed % 3, seed % 4] = 1
    assert ciou_each(heat, soft).tolist() == pytest.approx([slow_ciou(above_median(h), g) for h, g in zip(H, flat(soft), strict=True)], abs=1e-6)


@pytest.mark.quick
@some
@given(seed=seeds)
def test_two_sources_are_their_worst(seed):
    heat, truth = odd_maps(seed, 6)
    each = [slow_ciou(above_median(h), g) for h, g in zip(flat(heat), flat(truth), strict=True)]
    worst = [min(each[2*i:2*i + 2]) for i in range(3)]
    heat, truth = heat.unflatten(0, (3, 2)), truth.unflatten(0, (3, 2))
    assert iiou_each(heat, truth).tolist() == pytest.approx(worst, abs=1e-12)
    found = iiou_figures(heat, truth)
    assert [found[k]["value"] for k in ("IIoU", "IAUC")] == pytest.approx([sum(e >= .5 for e in worst) / 3, slow_area(worst)], abs=1e-4)
    assert iiou_each(heat.flip(1), truth.flip(1)).equal(iiou_each(heat, truth))  # which source is first does not matter


@pytest.mark.quick
@some
@given(seed=seeds)
def test_masks_are_their_definition(seed):
    heat, truth = odd_maps(seed)
    truth[2] = False  # nothing sounds
    ious, curves = [], []
    for h, g in zip(flat(heat), flat(truth), strict=True):
        p = [v > .5 for v in h]
        ious.append(slow_iou(p, g) if any(g) else sum(not v for v in p) / len(p))
        if not any(g): continue
        curve = []
        for k in range(255):
            p = [v >= k / 254 for v in h]
            tp = sum(bool(a and b) for a, b in zip(p, g, strict=True))
            precision, recall = tp / max(sum(p), 1), tp / sum(g)
            curve.append(1.3 * precision * recall / (.3 * precision + recall) if tp else 0)
        curves.append(curve)
    assert avs_each(heat, truth)[0].tolist() == pytest.approx(ious)
    found = avs_figures(heat, truth)
    assert found["M_J"]["value"] == pytest.approx(sum(ious) / 4, abs=1e-4) and found["M_F"]["n"] == 3
    assert found["M_F"]["value"] == pytest.approx(max(sum(c[k] for c in curves) / 3 for k in range(255)), abs=1e-4)
    assert found["M_F"]["lo"] <= found["M_F"]["value"] and found["M_F"]["hi"] <= 1


@pytest.mark.quick
@many
@given(seed=seeds, levels=st.sampled_from([None, 4]))
def test_localisation_ignores_order_scale_and_mirrors(seed, levels):
    heat, truth = maps(seed, levels=levels)
    each, order = ciou_each(heat, truth), torch.randperm(len(heat), generator=draw_of(seed))
    torch.testing.assert_close(ciou_each(heat[order], truth[order]), each[order])
    torch.testing.assert_close(ciou_each(heat.flip(2), truth.flip(2)), each)
    torch.testing.assert_close(ciou_each(heat * torch.arange(1, 6)[:, None, None] - 3, truth), each)  # each map its own scale
    result = ciou(heat, truth)
    assert 0 <= each.min() and each.max() <= 1 and 0.025 - 1e-9 <= result["AUC"] <= 1
    assert abs(result["AUC"] - result["mean"]) <= 0.025 + 1e-9  # the area under the share of successes is the mean, to one step's rounding
    assert ciou(heat.repeat(2, 1, 1), truth.repeat(2, 1, 1)) == pytest.approx(result | {"n": 10})  # every item twice
    assert all(torch.equal(a, b) for a, b in zip(avs_each(heat.flip(1), truth.flip(1)), avs_each(heat, truth), strict=True))
    if levels is None:
        assert pointing(heat.flip(1), truth.flip(1)) == pointing(heat, truth) == pointing(heat.exp(), truth)
        assert area_matched_iou(heat.flip(1), truth.flip(1)) == pytest.approx(area_matched_iou(heat, truth))
        found, same = (localisation_each(h, truth) for h in (heat, heat.double().exp()))
        assert all(torch.equal(v, same[k]) for k, v in found.items())  # any rising function


@pytest.mark.quick
@many
@given(seed=seeds)
def test_the_truth_itself_scores_one(seed):
    _, truth = maps(seed)
    assert pointing(truth.float(), truth) == area_matched_iou(truth.float(), truth) == ciou(truth, truth)["cIoU"] == 1
    result = segmentation(truth.float(), truth, [seed % 3] * len(truth))
    assert result["mAP"] == result["mIoU"] == 1
    iou, F, _ = avs_each(truth, truth)
    assert iou.eq(1).all() and F[:, 1:].min() > 1 - 1e-9  # at the lowest threshold everything is positive


# ---- segmentation ----

@pytest.mark.quick
@many
@given(seed=seeds, n=st.integers(1, 6), lists=st.booleans())
def test_segmentation_is_its_definition(seed, n, lists):
    heat, truth = odd_maps(seed, n)
    heat = (heat * 19).round()  # levels meet thresholds
    if n > 3: truth[2] = False; truth[0, 0, 0] = True  # one image without its object
    classes = [0] * min(n, 3) + [1] * (n - min(n, 3))
    found = segmentation(list(heat) if lists else heat, list(truth) if lists else truth, classes)
    for c in set(classes):
        rows = [i for i, k in enumerate(classes) if k == c]
        h, g = pooled(heat, rows), pooled(truth, rows)
        assert found[f"AP/{c}"] == pytest.approx(slow_ap(h, g), abs=1e-9)
        assert found[f"IoU/{c}"] == pytest.approx(slow_best_iou(h, g), abs=1e-9)
    for kind in ("AP", "IoU"): assert found[f"m{kind}"] == pytest.approx(sum(found[f"{kind}/{c}"] for c in set(classes)) / len(set(classes)))
    told = segmentation_figures(heat, truth, classes, n=50)
    for k, v in told.items(): assert v["value"] == pytest.approx(found[k], abs=1e-4) and v["lo"] <= v["value"] <= v["hi"] <= 1


@pytest.mark.quick
@many
@given(seed=seeds, levels=st.sampled_from([None, 6]))
def test_segmentation_ignores_order_and_linear_scale(seed, levels):
    heat, truth = maps(seed, n=8, levels=levels)
    classes = ["cat", "dog", "cat", "owl", "dog", "owl", "owl", "cat"]
    result, order = segmentation(heat, truth, classes), torch.randperm(8, generator=draw_of(seed)).tolist()
    same = lambda other: all(other[k] == pytest.approx(v, abs=1e-9) for k, v in result.items() if k != "n")
    assert same(segmentation(heat[order], truth[order], [classes[i] for i in order]))
    assert same(segmentation(heat.flip(2), truth.flip(2), classes))
    assert same(segmentation(8 * heat, truth, classes))  # a power of two moves no float across a threshold
    assert same(segmentation(heat.repeat(2, 1, 1), truth.repeat(2, 1, 1), classes * 2))  # every image twice
    monotone = segmentation(heat.double().exp(), truth, classes)  # any rising map keeps AP; IoU's thresholds are spaced linearly
    assert monotone["mAP"] == pytest.approx(result["mAP"], abs=1e-9)
    assert result["mAP"] == pytest.approx(sum(result[f"AP/{c}"] for c in ("cat", "dog", "owl")) / 3)


def test_average_precision_agrees_with_torchmetrics_and_scikit_learn():
    from sklearn.metrics import average_precision_score
    from torchmetrics.functional.classification import binary_average_precision, binary_jaccard_index
    heat, truth = maps(3, n=4, levels=9)
    ours = segmentation(heat, truth, [0] * 4)["AP/0"]
    assert ours == pytest.approx(binary_average_precision(heat.flatten(), truth.flatten().int()).item(), abs=1e-6)
    assert ours == pytest.approx(average_precision_score(truth.flatten(), heat.flatten()), abs=1e-12)
    iou = avs_each(heat, truth)[0]
    assert iou.tolist() == pytest.approx([binary_jaccard_index((h > .5).int(), g.int()).item() for h, g in zip(heat, truth, strict=True)])


@pytest.mark.quick
def test_segmentation_reads_one_image_at_a_time():
    heat, truth = [torch.rand(4, 5, generator=draw_of(i)) for i in range(6)], [torch.rand(9 + i, 8, generator=draw_of(i)) < .4 for i in range(6)]
    alive, most = [0], [0]

    class Watched(AtSize):
        def __getitem__(self, i):
            x = super().__getitem__(i)
            alive[0] += 1; most[0] = max(most[0], alive[0])
            weakref.finalize(x, lambda: alive.__setitem__(0, alive[0] - 1))
            return x

    found = segmentation_figures(Watched(heat, truth), truth, ["a", "b"] * 3, n=20)
    assert most[0] <= 2 and alive[0] == 0
    assert found["mAP"]["value"] == pytest.approx(segmentation([AtSize(heat, truth)[i] for i in range(6)], truth, ["a", "b"] * 3)["mAP"], abs=1e-4)


@pytest.mark.quick
@some
@given(seed=seeds, every=st.booleans())
def test_heads_are_assigned_as_defined(seed, every):
    draw = draw_of(seed)
    heats, (_, truth) = torch.randint(5, (2, 4, 3, 4), generator=draw).float(), odd_maps(seed)
    speech = torch.tensor([True, False, True, False])
    def slow(head, kind):
        rows = [i for i in range(4) if every or bool(speech[i]) == kind]
        return slow_ap(pooled(heats[head], rows), [v * (bool(speech[i]) == kind) for i in rows for v in truth[i].flatten().tolist()])
    assert ap_dis(heats, truth, speech, every, n=10)["AP-dis"] == pytest.approx(max((slow(a, True) + slow(1 - a, False)) / 2 for a in (0, 1)))


@pytest.mark.quick
@many
@given(seed=seeds, on=st.floats(0, .3), long=st.floats(.05, .3))
def test_a_prompt_is_the_mean_of_its_moments(seed, on, long):
    draw = draw_of(seed)
    heard, volume = torch.rand(30, generator=draw) < .8, torch.randn(30, 2, 3, generator=draw)
    heard[5:10] = True
    for span in (None, (on, on + long)):
        weight = [float(h) * (1 if span is None else max(0, min((t + 1) / 50, span[1] + .2) - max(t / 50, span[0] - .2)) * 50) for t, h in enumerate(heard.tolist())]
        found = prompt_weight(heard, span)
        assert found.tolist() == pytest.approx(weight, abs=1e-5)
        mean = sum(w * v for w, v in zip(weight, volume, strict=True)) / sum(weight)
        torch.testing.assert_close(prompt_heat(volume, found), mean, atol=1e-5, rtol=0)


# ---- intervals and baselines ----

@pytest.mark.quick
@many
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_interval_holds_its_value(values, seed):
    value, lo, hi = bootstrap(values, n=200, seed=seed)
    assert min(values) - 1e-9 <= lo <= hi <= max(values) + 1e-9
    assert value == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert (value, lo, hi) == bootstrap(values, n=200, seed=seed)


@pytest.mark.quick
def test_interval_is_the_quantiles_of_resampled_figures():
    values, draw = torch.rand(30, generator=draw_of(0)).double(), draw_of(5)
    again = sorted(statistics.median(values[i] for i in torch.randint(30, (30,), generator=draw).tolist()).item() for _ in range(101))
    at = lambda q: again[math.floor(100*q)] + (100*q - math.floor(100*q)) * (again[math.ceil(100*q)] - again[math.floor(100*q)])
    value, lo, hi = bootstrap_of(values, lambda x: x.quantile(.5), n=101, seed=5)
    assert (value.item(), lo.item(), hi.item()) == pytest.approx((statistics.median(values.tolist()), at(.025), at(.975)), abs=1e-12)


def test_interval_covers_nineteen_times_of_twenty():
    draw, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        _, lo, hi = bootstrap(torch.rand(100, generator=draw) < 0.4, n=300, seed=seed)
        held += lo <= 0.4 <= hi
    assert 0.90 < held / 200 < 0.99


@pytest.mark.quick
def test_baselines_stand_beside_every_figure():
    heat, truth = maps(0, 6, 16, 16)
    frames = torch.randint(256, (6, 3, 20, 20), generator=draw_of(0), dtype=torch.uint8)
    wholes = {"place": localisation_figures, "mask": avs_figures, "class": partial(segmentation_figures, classes=list("aabbcc"), n=20)}
    for name, figures in wholes.items():
        found = with_baselines(figures, heat, truth, frames, heat.roll(1, 0))
        assert set(found["baselines"]) == {"everything", "saliency", "centre", "random", "shuffled"}
        for rule, beside in found["baselines"].items(): assert set(found["metrics"]) - set(beside) == ({"pointing"} if (name, rule) == ("place", "everything") else set()), (name, rule)
        assert found["metrics"] == figures(heat, truth) and found["baselines"]["shuffled"] == figures(heat.roll(1, 0), truth)
        assert found["baselines"]["centre"] == figures(centre_heat(16, 16).expand(6, 16, 16), truth) and found["baselines"]["everything"] == figures(everything(6, 16, 16), truth)
        assert found == with_baselines(figures, heat, truth, frames, heat.roll(1, 0))
    assert found["baselines"]["everything"]["AP/a"]["value"] == pytest.approx(truth[:2].float().mean().item(), abs=1e-4) == found["baselines"]["everything"]["IoU/a"]["value"]
    assert "shuffled" not in with_baselines(localisation_figures, heat, truth, frames)["baselines"]


# ---- refusals ----

HEAT, TRUTH = maps(1, 3, 4, 4)
BAD = {
    "scores that are not numbers": (lambda: retrieval(torch.full((3, 3), torch.nan)), "9 of 9 scores are NaN"),
    "scores that are no square": (lambda: retrieval(torch.zeros(3, 4)), r"must be \(N, N\)"),
    "no scores": (lambda: retrieval(torch.zeros(0, 0)), "with N > 0"),
    "labels of another length": (lambda: retrieval(torch.zeros(3, 3), ["a", "b"]), "3 clips and labels for 2"),
    "a clip without a label": (lambda: retrieval(torch.zeros(2, 2), [["a"], []]), r"clip\(s\) \[1\] of 2 have no label"),
    "maps of another size": (lambda: ciou(HEAT, TRUTH[:, :2]), "one shape"),
    "maps that are not finite": (lambda: pointing(HEAT / 0, TRUTH), "not finite"),
    "truth without an object": (lambda: ciou(HEAT, TRUTH & False), r"item\(s\) \[0, 1, 2\] of 3 have no positive pixel"),
    "truth that is a label map": (lambda: localisation_figures(HEAT, 2 * TRUTH.int()), "truth == label"),
    "truth that is not a number": (lambda: ciou(HEAT, TRUTH / torch.zeros(1)), "from 0 to 1"),
    "one source": (lambda: iiou_figures(HEAT, TRUTH), r"\(N, S, H, W\)"),
    "no probabilities": (lambda: avs_figures(3 * HEAT, TRUTH), "needs probabilities"),
    "no sounding object anywhere": (lambda: avs_figures(HEAT, TRUTH & False), "none of 3 truths has an object"),
    "classes of another length": (lambda: segmentation(HEAT, TRUTH, ["a"]), "3 maps, 3 truths and 1 classes"),
    "a class without a pixel": (lambda: segmentation_figures(HEAT, TRUTH & torch.tensor([True, False, False])[:, None, None], "aba"), "class 'b' has no positive pixel in any of its 1 images"),
    "an image of another size": (lambda: segmentation(list(HEAT), [TRUTH[0], TRUTH[1, :2], TRUTH[2]], "aaa"), "image 1: needs heat and truth of one shape"),
    "nothing to resample": (lambda: bootstrap([]), "at least one item"),
    "a value that is not a number": (lambda: bootstrap([1., math.nan]), "1 of them not finite"),
    "a silent prompt": (lambda: prompt_weight(torch.zeros(9)), "nothing is heard"),
    "pictures that are missing": (lambda: with_baselines(localisation_figures, HEAT, TRUTH, torch.zeros(2, 3, 8, 8)), "3 truths and 2 frames"),
    "pictures that can be read once": (lambda: stream_scores(torch.ones(2, 3, 4), iter([torch.ones(2, 3, 4)])), "read once only"),
    "a sound with nothing to keep": (lambda: stream_scores(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3).bool()), "no token is kept"),
    "sounds per frame, one picture": (lambda: stream_scores(torch.ones(2, 5, 3, 4), torch.ones(2, 3, 4)), "as many frames"),
    "whole numbers as tokens": (lambda: stream_scores(torch.ones(2, 3, 4).int(), torch.ones(2, 3, 4)), "floating-point"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    bad, says = BAD[name]
    with pytest.raises(ValueError, match=says): bad()
