"""What must not move a metric, and what must: properties over many small sets."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb.metrics import area_matched_iou, bootstrap, ciou, ciou_each, pointing, ranks, retrieval, segmentation

seeds = st.integers(0, 2**20)
many = settings(max_examples=40, deadline=None, derandomize=True)


def draw_of(seed): return torch.Generator().manual_seed(seed)


def maps(seed, n=5, h=6, w=7, levels=None):
    "Heat and truth, every truth with a pixel; `levels` makes ties."
    draw = draw_of(seed)
    heat, truth = torch.rand(n, h, w, generator=draw), torch.rand(n, h, w, generator=draw) < 0.3
    truth[:, seed % h, seed % w] = True
    return ((heat * levels).floor() / levels if levels else heat), truth


@pytest.mark.quick
@many
@given(seed=seeds, n=st.integers(1, 30), levels=st.sampled_from([2, 5, 1000]))
def test_retrieval_ignores_order_and_scale(seed, n, levels):
    draw = draw_of(seed)
    scores = torch.randint(levels, (n, n), generator=draw).double()
    result, order = retrieval(scores), torch.randperm(n, generator=draw)
    assert retrieval(scores[order][:, order]) == result  # the pairs in another order
    assert retrieval(scores.sqrt() * 3 - 7) == result    # any rising function
    flipped = retrieval(scores.T)                        # the other direction
    assert {k.replace("a2v", "x").replace("v2a", "a2v").replace("x", "v2a"): v for k, v in flipped.items()} == result
    best, middle, ties = ranks(scores)
    assert (best >= 1).all() and (best + ties <= n).all() and (middle == best + ties / 2).all()
    assert result["a2v/R@1"] <= result["a2v/R@5"] <= result["a2v/R@10"]
    better = scores + 1e6 * torch.eye(n)                 # every true pair raised above all
    assert retrieval(better)["a2v/R@1"] == retrieval(better)["v2a/MeanR_mid"] == 1


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
    if levels is None:
        assert pointing(heat.flip(1), truth.flip(1)) == pointing(heat, truth) == pointing(heat.exp(), truth)
        assert area_matched_iou(heat.flip(1), truth.flip(1)) == pytest.approx(area_matched_iou(heat, truth))
        assert area_matched_iou(-heat, ~truth) <= 1


@pytest.mark.quick
@many
@given(seed=seeds)
def test_the_truth_itself_scores_one(seed):
    _, truth = maps(seed)
    assert pointing(truth.float(), truth) == area_matched_iou(truth.float(), truth) == ciou(truth, truth)["cIoU"] == 1
    result = segmentation(truth.float(), truth, [seed % 3] * len(truth))
    assert result["mAP"] == result["mIoU"] == 1


@pytest.mark.quick
@many
@given(seed=seeds, levels=st.sampled_from([None, 6]))
def test_segmentation_ignores_order_and_linear_scale(seed, levels):
    heat, truth = maps(seed, n=8, levels=levels)
    classes = ["cat", "dog", "cat", "owl", "dog", "owl", "owl", "cat"]
    result, order = segmentation(heat, truth, classes), torch.randperm(8, generator=draw_of(seed)).tolist()
    same = lambda other: all(other[k] == pytest.approx(v, abs=1e-9) for k, v in result.items())
    assert same(segmentation(heat[order], truth[order], [classes[i] for i in order]))
    assert same(segmentation(heat.flip(2), truth.flip(2), classes))
    assert same(segmentation(8 * heat, truth, classes))  # a power of two moves no float across a threshold
    monotone = segmentation(heat.double().exp(), truth, classes)  # any rising map keeps AP; IoU's thresholds are spaced linearly
    assert monotone["mAP"] == pytest.approx(result["mAP"], abs=1e-9)
    assert result["mAP"] == pytest.approx(sum(result[f"AP/{c}"] for c in ("cat", "dog", "owl")) / 3)


@pytest.mark.quick
def test_average_precision_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import binary_average_precision
    heat, truth = maps(3, n=4, levels=9)
    ours = segmentation(heat, truth, [0] * 4)["AP/0"]
    assert ours == pytest.approx(binary_average_precision(heat.flatten(), truth.flatten().int()).item(), abs=1e-6)


@pytest.mark.quick
@many
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_interval_holds_its_value(values, seed):
    value, lo, hi = bootstrap(values, n=200, seed=seed)
    assert min(values) - 1e-9 <= lo <= hi <= max(values) + 1e-9
    assert value == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert (value, lo, hi) == bootstrap(values, n=200, seed=seed)


def test_interval_covers_nineteen_times_of_twenty():
    draw, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        _, lo, hi = bootstrap(torch.rand(100, generator=draw) < 0.4, n=300, seed=seed)
        held += lo <= 0.4 <= hi
    assert 0.90 < held / 200 < 0.99
