"""Seating for any groups, and loading that does not depend on how it is done."""
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avnb.batches import AudioView, ClipDataset, View, VideoSampler, finish, loader
from avnb.media import write_video
from avnb.rows import StoreConfig
from avnb.store import open_store, prepare

sizes = st.lists(st.integers(1, 40), min_size=2, max_size=40)


@pytest.mark.quick
@settings(deadline=None, max_examples=300)
@given(sizes=sizes, batch_size=st.integers(2, 64), per_group=st.integers(1, 4), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_seats(sizes, batch_size, per_group, seed, epoch):
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    sampler = VideoSampler(groups, batch_size, per_group=per_group, seed=seed).set_epoch(epoch)
    batches, most = list(sampler), min(batch_size, int(np.minimum(sizes, per_group).sum()))
    assert len(batches) == len(sampler) == -(-len(groups) // most)
    rows = [r for b in batches for r in b]
    assert len(rows) == len(set(rows)), "a row twice"
    seats = Counter(groups[rows].tolist())
    assert seats == {g: min(n, per_group * len(batches)) for g, n in enumerate(sizes)}, "all save the surplus"
    assert sampler.surplus == len(groups) - len(rows)
    assert max(max(Counter(groups[b].tolist()).values()) for b in batches if b) <= per_group
    assert max(map(len, batches)) - min(map(len, batches)) <= 1 and max(map(len, batches)) <= most
    assert batches == list(VideoSampler(groups, batch_size, per_group=per_group, seed=seed).set_epoch(epoch))


@pytest.mark.quick
@settings(deadline=None, max_examples=100)
@given(sizes=sizes, batch_size=st.integers(8, 64), world=st.integers(1, 4), start=st.integers(0, 3))
def test_ranks_share_the_same_batches(sizes, batch_size, world, start):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    one = VideoSampler(groups, batch_size)
    if one.used // one.batches < world:
        with pytest.raises(ValueError, match="cannot be shared"): VideoSampler(groups, batch_size, world=world)
        return
    start = min(start, one.batches)
    ranks = [list(VideoSampler(groups, batch_size, rank=r, world=world).set_epoch(2, start)) for r in range(world)]
    assert {len(r) for r in ranks} == {one.batches - start}
    for whole, *parts in zip(list(one.set_epoch(2))[start:], *ranks, strict=True):
        assert [r for p in parts for r in p] == whole
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.quick
@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=12), batch_size=st.integers(2, 12), seed=st.integers(0, 9))
def test_what_waits_comes_next(sizes, batch_size, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    sampler = VideoSampler(groups, batch_size, seed=seed)
    rounds = -(-max(sizes) // sampler.seats)  # epochs until the largest group has been seen in full
    seen = Counter(r for e in range(rounds) for b in sampler.set_epoch(e) for r in b)
    assert set(seen) == set(range(len(groups)))
    for g in range(len(sizes)):
        times = [seen[r] for r in np.flatnonzero(groups == g)]
        assert max(times) - min(times) <= 1, "nobody sits twice before all have sat"


@pytest.mark.quick
def test_rows_meet_others_each_epoch():
    groups = np.repeat(np.arange(60), 10)
    sampler, met = VideoSampler(groups, 48), set()
    for e in range(30):
        for b in sampler.set_epoch(e):
            if 0 in b: met |= set(groups[b].tolist())
    assert len(met) == 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("batches")
    g = torch.Generator().manual_seed(0)
    for i in range(8):
        frames = torch.randint(0, 255, (50, 3, 32 + 2 * i, 40), dtype=torch.uint8, generator=g)
        write_video(d / f"src/{i}.mp4", frames, 25, {l: torch.rand(96_000, generator=g) - 0.5 for l in ("en", "fr")})
    prepare(d / "src", d / "store", recipe=StoreConfig(workers=0))
    return open_store(d / "store")


VIEW = View(track="random", audio=AudioView(seconds=0.7))
RICH = View(track="random", audio=AudioView(seconds=0.7), frames=3, splice=0.6)


def epochs(load, n=2): return [b for e in range(n) for b in load.set_epoch(e)]


@pytest.mark.parametrize("view", [VIEW, RICH], ids=["one frame", "several frames, spliced"])
def test_processes_and_caches_change_nothing(data, view):
    torch.set_num_threads(1)
    def batches(workers, cache):
        clips = ClipDataset(data, view=view, cache=cache)
        return epochs(loader(clips, VideoSampler(clips.groups, 5), workers=workers))
    want = batches(0, False)
    for got in (batches(0, True), batches(2, False)):
        assert len(got) == len(want)
        for a, b in zip(want, got, strict=True):
            assert a["language"] == b["language"]
            assert a.keys() == b.keys()
            for k in a.keys() - {"language"}: assert torch.equal(a[k], b[k]), k


@pytest.mark.quick
def test_a_clip_does_not_depend_on_its_batch(data):
    clips = ClipDataset(data, view=VIEW)  # frames of eight sizes
    sampler = VideoSampler(clips.groups, 8)
    for batch, rows in zip(loader(clips, sampler, workers=0), sampler, strict=True):
        for b, r in enumerate(rows):
            alone = clips[r]
            assert torch.allclose(alone["image"], batch["image"][b], atol=1e-4), r
            assert torch.equal(alone["audio"], batch["audio"][b, :len(alone["audio"])])


@pytest.mark.quick
def test_a_dataset_travels_without_its_data(data):
    import pickle
    clips = ClipDataset(data, view=VIEW, cache=True)
    want = clips[3]
    packed = pickle.dumps(clips)
    assert len(packed) < 100_000
    assert torch.equal(pickle.loads(packed)[3]["image"], want["image"])


@pytest.mark.quick
def test_a_run_goes_on_with_the_same_splices(data):
    clips = ClipDataset(data, view=RICH)
    load = loader(clips, VideoSampler(clips.groups, 5), workers=0)
    whole = list(load.set_epoch(3))
    assert any(b["spliced"].any() for b in whole)
    for start in range(len(load)):
        for a, b in zip(whole[start:], load.set_epoch(3, start), strict=True):
            for k in a.keys() - {"language"}: assert torch.equal(a[k], b[k]), (start, k)
        load.set_epoch(3)


@pytest.mark.quick
@settings(deadline=None, max_examples=25)
@given(frames=st.integers(1, 7), splice=st.sampled_from([0.0, 0.3, 1.0]), frame=st.sampled_from(["random", "middle"]), epoch=st.integers(0, 9), n=st.integers(1, 8))
def test_a_richer_view_changes_only_what_it_adds(data, frames, splice, frame, epoch, n):
    rows = list(range(0, 2 * n, 2))
    plain, rich = (finish(ClipDataset(data, view=View(frame=frame, **more)).raw(rows, epoch)) for more in ({}, dict(frames=frames, splice=splice)))
    own = ~rich["spliced"] if splice else torch.ones_like(plain["keep"])
    assert ("spliced" in rich) == (splice > 0) and torch.equal(rich["audio"][own], plain["audio"][own])
    for k in ("keep", "row", "offset_s"): assert torch.equal(rich[k], plain[k]), k
    assert rich["language"] == plain["language"]
    if frames == 1:
        for k in ("image", "time"): assert torch.equal(rich[k], plain[k]), k
    else:
        assert rich["image"].shape == (n, frames, *plain["image"].shape[1:]) and rich["time"].shape == (n, frames)
        assert (rich["time"].diff(dim=1) >= 0).all()
    share = (~own).float().sum(1) / rich["keep"].sum(1)
    assert ((share == 0) | ((share > 0.149) & (share <= 0.4))).all() and (splice < 1 or n == 1 or (share > 0).all())


@pytest.mark.quick
def test_spliced_sound_is_a_strangers(data):
    clips = ClipDataset(data, view=View(splice=1.0, audio=AudioView(gain_db=0)))
    plain = ClipDataset(data, view=View(audio=AudioView(gain_db=0)))
    sampler = VideoSampler(clips.groups, 5)
    for rows in sampler:
        mixed, sounds = finish(clips.raw(rows)), finish(plain.raw(rows))["audio"]
        for b, where in enumerate(mixed["spliced"]):
            core = where.nonzero().flatten()[80:-80]  # between the fades
            from_whom = [c for c in range(len(rows)) if torch.allclose(mixed["audio"][b, core], sounds[c, core], atol=1e-4)]
            assert len(from_whom) == 1 and clips.groups[rows[from_whom[0]]] != clips.groups[rows[b]]
