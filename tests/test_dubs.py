"""Dubs: what no notebook can see. Seats without overlap for any spans, loading that does not depend on how it is done, two processes that give the loss of one."""
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from avnb.batches import loader
from avnb.core import write_atomic, write_json
from avnb.dub_study import ASKED, FIGURES, criteria, criteria_table, differences_table, paired, study, study_recipes
from avnb.groups import VideoSampler
from avnb.media import write_video
from avnb.recipes import to_dict
from avnb.results import write_items
from avnb.rows import StoreConfig
from avnb.store import open_store, prepare
from avnb.sweeps import sweep
from avnb.toy import make_toy
from avnb.tracksets import DubDataset, DubView, dub_counts

TITLES = st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=12), min_size=2, max_size=8)


def overlap(a, b): return a[0] < b[1] and b[0] < a[1]


@pytest.mark.quick
@settings(deadline=None, max_examples=200)
@given(titles=TITLES, batch_size=st.integers(2, 24), per_group=st.integers(1, 4), seed=st.integers(0, 3))
def test_clips_of_a_title_never_overlap(titles, batch_size, per_group, seed):
    groups = np.repeat(np.arange(len(titles)), [len(t) for t in titles])
    spans = [(a, a + d) for t in titles for a, d in t]
    sampler, seen = VideoSampler(groups, batch_size, per_group=per_group, seed=seed, spans=spans), Counter()
    rounds = int(sampler.layers.max()) * -(-len(groups) // max(1, sampler.seats))
    for e in range(2 * rounds):
        batches = list(sampler.set_epoch(e))
        assert len(batches) == len(sampler)
        for b in batches:
            assert max(Counter(groups[b].tolist()).values(), default=0) <= per_group
            for i in b: assert not any(i != j and groups[i] == groups[j] and overlap(spans[i], spans[j]) for j in b)
        rows = [r for b in batches for r in b]
        assert len(rows) == len(set(rows))
        seen.update(rows)
    assert set(seen) == set(range(len(groups))), "every row has its turn"


@pytest.mark.quick
@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=12), batch_size=st.integers(2, 24), per_group=st.integers(1, 4), epoch=st.integers(0, 4))
def test_spans_that_do_not_overlap_change_nothing(sizes, batch_size, per_group, epoch):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    spans = [(3 * i, 3 * i + 3) for n in sizes for i in range(n)]
    plain, told = (VideoSampler(groups, batch_size, per_group=per_group, **k).set_epoch(epoch) for k in ({}, {"spans": spans}))
    assert list(plain) == list(told)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Six films: dubbed, dubbed twice in a language, not dubbed, with and without music and effects; the last segment is short."
    d, g = tmp_path_factory.mktemp("dubs"), torch.Generator().manual_seed(0)
    for i, languages in enumerate((["en", "fr", "zxx"], ["en", "fr", "de"], ["en"], ["en", "en"], ["fr", "zxx"], ["und", "ja"])):
        frames = torch.randint(0, 255, (220, 3, 8, 10), dtype=torch.uint8, generator=g).repeat_interleave(5, 2).repeat_interleave(5, 3)
        write_video(d / f"src/{i}.mp4", frames, 25, [(l, torch.rand(220 * 1920, generator=g) - 0.5) for l in languages])
    prepare(d / "src", d / "store", recipe=StoreConfig(workers=0, rate_hz=48_000, seconds=3.0, fps=16 / 3))
    return open_store(d / "store")


VIEW = DubView(size=24, short=(28, 36), extra=1, track="random", frames=8)


def epochs(clips, workers=0, n=2):
    load = loader(clips, VideoSampler(clips.titles, 5, per_group=2), workers=workers)
    return [b for e in range(n) for b in load.set_epoch(e)]


def same(a, b, exact=True):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x["language"] == y["language"]
        for k in x.keys() - {"language"}:
            if exact or not x[k].is_floating_point(): assert torch.equal(x[k], y[k]), k
            else: assert torch.allclose(x[k], y[k], atol=1e-3), k


def test_processes_and_memory_change_nothing(store):
    torch.set_num_threads(1)
    want = epochs(DubDataset(store, view=VIEW))
    same(want, epochs(DubDataset(store, view=VIEW), workers=2))
    kept = DubDataset(store, view=VIEW, cache=True)
    first = epochs(kept)
    same(first, epochs(kept))                                             # from memory
    same(first, epochs(DubDataset(store, view=VIEW, cache=True, cache_mb=0)))  # without room
    same(want, first, exact=False)                                        # log-mels one by one, or a batch at once


@pytest.mark.quick
def test_what_is_heard(store):
    assert len(store) == 18 and store["dur_s"][2] < 3
    clips = DubDataset(store, view=VIEW)
    tracks = store["tracks"][:]
    for batch in epochs(clips, n=4):
        assert batch["video"].shape[1:] == (2, 3, 8, 24, 24) and batch["audio"].shape[1:] == (2, 1, 96, 288) and batch["extra"].shape[1:] == (1, 1, 96, 288)
        for row, dubbed, heard, (first, second, third) in zip(batch["row"].tolist(), batch["dubbed"].tolist(), batch["heard"][:, 0].tolist(), batch["language"], strict=True):
            there = {*tracks[row]} - {"zxx"}
            assert {first, second, third} <= there, "music and effects are no dub"
            assert dubbed == (first != second) == (len(there) > 1)
            assert heard == (len({first, second, third}) == 3) == (len(there) > 2)
    control = DubDataset(store, view=replace(VIEW, other="track", extra=0))
    assert all(b for batch in epochs(control) for b, r in zip(batch["dubbed"].tolist(), batch["row"].tolist(), strict=True) if tracks[r] == ["en", "en"])
    counts = dub_counts(store)
    assert counts["undubbed"] == 0.5 and counts["effects"] == pytest.approx(1 / 3) and counts["languages"] == {"de": 3, "en": 12, "fr": 9, "ja": 3, "und": 3}
    assert dub_counts(store, [0, 3])["dubs"] == 1.5
    short = DubDataset(store, [2], view=VIEW.still())[0]
    assert (short["audio"][0, 0, :, -5:] == -100).all(), "a short segment is padded with silence at its end"


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from avnb.losses import LogScale, dub_contrast
from avnb.processes import average_gradients
world = int(os.environ.get("WORLD_SIZE", 1)); rank = int(os.environ.get("RANK", 0))
if world > 1: dist.init_process_group("gloo")
g = torch.Generator().manual_seed(0)
x = torch.randn(9, 5, 12, generator=g).double(); heard = torch.tensor([[True], [False], [True]]*3)
torch.manual_seed(1); head, scale = torch.nn.Linear(12, 8).double(), LogScale(10.).double()
part = [slice(0, 4), slice(4, 9)][rank] if world > 1 else slice(0, 9) # unequal shares
z = head(x[part])
loss, terms = dub_contrast(*z[:, :4].unbind(1), scale(), .3, .2, sys.argv[2], extra=z[:, 4:], heard=heard[part], world=world)
loss.backward()
params = [*head.parameters(), *scale.parameters()]
average_gradients(params, world)
if rank == 0: save_file({"loss": loss.detach(), **{k: v.clone() for k, v in terms.items()}, **{f"grad {i}": p.grad.clone() for i, p in enumerate(params)}}, sys.argv[1])
if world > 1: dist.barrier(); dist.destroy_process_group()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]


@pytest.mark.parametrize("mixing", ["additive", "convex"])
def test_two_processes_give_the_loss_of_one(tmp_path, mixing):
    (tmp_path / "job.py").write_text(SCRIPT)
    found = []
    for world, start in ((1, []), (2, TORCHRUN)):
        out = tmp_path / f"{world}.safetensors"
        subprocess.run([sys.executable, *start, str(tmp_path / "job.py"), str(out), mixing], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        found.append(load_file(out))
    one, two = found
    assert one.keys() == two.keys() and len([k for k in one if k.startswith("grad")]) == 3
    for k, v in one.items(): assert (v - two[k]).norm() <= 1e-6 * max(float(v.norm()), 1e-6), k


def test_settings_of_the_study_differ_in_the_second_hearing_alone(tmp_path):
    torch.set_num_threads(1)
    made, batches = {k.partition(",")[0]: r for k, r in study_recipes((3,), ("none", "dub", "control", "nospeech")).items()}, {}
    for setting, r in made.items():
        where = tmp_path / r.data.kind
        if not where.exists(): prepare(make_toy(where, 2, kind=r.data.kind, workers=1), tmp_path / f"{r.data.kind}-store", recipe=replace(r.store, workers=0))
        clips = DubDataset(open_store(tmp_path / f"{r.data.kind}-store"), None, r.view, seed=r.seed)
        batches[setting] = list(loader(clips, VideoSampler(clips.groups, 2, seed=r.seed), workers=0))
    for none, dub, control, nospeech in zip(*(batches[k] for k in made), strict=True):
        for other in (dub, control, nospeech): assert torch.equal(none["row"], other["row"]) and torch.equal(none["video"], other["video"])
        for other in (dub, control):
            assert torch.equal(none["audio"][:, 0], other["audio"][:, 0]), "the first hearing is the same"
            assert other["dubbed"].all() and (none["audio"][:, 1] - other["audio"][:, 1]).abs().flatten(1).mean(1).gt(3).all(), "the second one says something else"
        assert not none["dubbed"].any() and not nospeech["dubbed"].any()
        assert {x for pair in none["language"] + control["language"] for x in pair} == {"en"} and all(a == "en" != b for a, b in dub["language"])


NUMBERS = st.lists(st.tuples(st.floats(.01, 1), st.floats(.01, 1)), min_size=1, max_size=5)


@pytest.mark.quick
@settings(deadline=None, max_examples=100)
@given(same=NUMBERS, far=NUMBERS, sound=NUMBERS, n=st.integers(1, 5))
def test_criteria_are_what_they_say(same, far, sound, n):
    held = {k: [x[i % len(x)] for i in range(n)] for k, x in zip((k for k, *_ in ASKED), (same, far, sound), strict=True)}
    none, dub = ({k: [pair[j] for pair in x] for k, x in held.items()} for j in (0, 1))
    (a, b), (c, d), (e, f) = ((sum(none[k]) / n, sum(dub[k]) / n) for k, *_ in ASKED)
    want = [b >= 1.5 * a, d <= .65 * c, f - e >= .05 and all(y > x for x, y in zip(none[ASKED[2][0]], dub[ASKED[2][0]], strict=True))]
    close = [abs(b / a - 1.5), abs(d / c - .65), abs(f - e - .05)]
    assert all(x["holds"] == w for x, w, gap in zip(criteria(none, dub), want, close, strict=True) if gap > 1e-9)


@pytest.mark.quick
@settings(deadline=None, max_examples=30)
@given(g=st.integers(0, 10**6).map(np.random.default_rng), seeds=st.integers(2, 4), n=st.integers(2, 20))
def test_a_paired_difference_forgets_what_both_share(g, seeds, n):
    scene, gain = g.normal(size=(seeds, n)), g.normal(size=(1, n)) * .1
    of = paired((scene + gain).mean(1), scene.mean(1), list(scene + gain), list(scene))
    assert abs(of["mean"] - gain.mean()) < 1e-4 and of["hi"] - of["lo"] < 1e-3, "seeds differ, their differences do not"
    assert gain.min() - 1e-4 <= of["clips"]["lo"] <= of["clips"]["hi"] <= gain.max() + 1e-4
    assert paired([0.], [1.], [None], [scene[0]])["clips"] is None


def finished(out, made, values):
    "Run folders as training leaves them: `values` {run: sound class}, everything else one half."
    for name, x in values.items():
        answers = {k: [.5] * 4 for k in FIGURES} | {"probe/class/ja": [x] * 4}
        found = {k: {"value": float(np.mean(v)), "lo": 0, "hi": 1, "n": 4} for k, v in answers.items()}
        write_json(out / name / "recipe.json", to_dict(made[name]))
        write_items(out / name, [{"kind": "dubs", "id": str(i), **{k: v[i] for k, v in answers.items()}} for i in range(4)])
        write_json(out / name / "results.json", {"format": 1, "checkpoint": 220, "protocol": "made up", "metrics": found, "baselines": {"random init": found}})
        write_atomic(out / name / "metrics.jsonl", '{"step": 220, "cpu_s": 1.0}\n')
    sweep({name: made[name] for name in values}, out, command="made up")
    return study(out)


@pytest.mark.quick
def test_a_study_pairs_the_seeds_that_both_settings_have(tmp_path):
    made = study_recipes((0, 1, 2)) | study_recipes((1,), ("none", "dub"), ("mvit-toy",))
    values = {"none,seed=0": .1, "none,seed=1": .2, "none,seed=2": .3, "dub,seed=2": .9, "dub,seed=1": .6, "none+mvit-toy,seed=1": .4, "dub+mvit-toy,seed=1": .42}
    found = finished(tmp_path / "part", made, values)
    assert found["differences"]["dub - none"]["probe/class/ja"]["mean"] == pytest.approx(.5) and found["settings"]["none"]["figures"]["probe/class/ja"] == [.1, .2, .3]
    assert found["differences"]["dub - none"]["probe/class/ja"]["clips"] == {"lo": .5, "hi": .5, "n": 4}
    assert [c["by_seed"] for c in found["criteria"]["toy"]][2] == [.4, .6] and [c["by_seed"] for c in found["criteria"]["mvit-toy"]][2] == [.02]
    assert "dub - control" not in found["differences"] and len(criteria_table(found)) == 6 and len(differences_table(found)) == 2 * len(FIGURES)
    assert len(finished(tmp_path / "one", made, {"none,seed=0": .3})["criteria"]) == 0
