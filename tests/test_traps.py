"""The traps of the published code: a check for each, and for each check the faults put back, to see that it fails.

A check is a function of an empty folder that asserts. A fault is a function of pytest's monkeypatch that brings the old mistake back.
"""
import contextlib
import json
import platform
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch import nn

from avnb import batches, checkpoints, decoding, encoders, gradients, losses, media, negatives, objectives, rows, similarity, store, training, viz
from avnb.core import read_json
from avnb.groups import VideoSampler
from avnb.media import VideoWriter, decode_frames, probe, write_video
from avnb.models import DenseAligner
from avnb.recipes import LossConfig, ModelConfig, recipe
from avnb.rows import StoreConfig
from avnb.toy import draw, plan
from avnb.training import fit


# ---- things to train on, in a second ----

def tone(seconds, step=0.05, loud=0.3, rate_hz=48_000): return loud * torch.sin(torch.arange(round(rate_hz * seconds)) * step)


def square(path, seed, seconds=2, sound=None):
    "A bright square that moves over grey, and a tone."
    frames = torch.full((round(25 * seconds), 3, 64, 64), 40, dtype=torch.uint8)
    for i in range(len(frames)): frames[i, :, 8 + i % 32:24 + i % 32, 4 * seed % 40:4 * seed % 40 + 16] = 120 + 10 * seed % 130
    return write_video(path, frames, 25, {"en": tone(seconds, 0.01 * (1 + seed)) if sound is None else sound})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A working directory of its own, with a store of 12 clips of 6 videos, and a HuBERT and a DINOv2 as published, but tiny."
    import transformers as hf
    top = tmp_path_factory.mktemp("traps")
    (top / "settings.ini").write_text("[paths]\ndata = data\nfigures = figures\nruns = runs\n[run]\ndevice = cpu\nworkers = 0\n")
    for i in range(6): square(top / f"videos/{i}.mp4", i)
    store.prepare(top / "videos", top / "store", recipe=StoreConfig(fps=5, size=64, workers=0))
    torch.manual_seed(0)
    hf.HubertModel(hubert()).save_pretrained(top / "hubert")
    hf.Dinov2Model(hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
                                   hidden_dropout_prob=0.1)).save_pretrained(top / "dino")
    return top


def hubert(norm="group", **more):
    "Two layers, with all that makes a tower in training different from one at rest: dropouts, layer drop, SpecAugment."
    import transformers as hf
    return hf.HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=16,
                           num_conv_pos_embedding_groups=4, hidden_dropout=0.2, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", conv_bias=norm == "layer",
                           mask_time_prob=0.3, mask_time_length=4, mask_feature_prob=0.2, mask_feature_length=4, layerdrop=0.1, **more)


def small(steps=6, **changes):
    "A recipe on the store in the working directory: 3 batches of 4 an epoch."
    made = {"view.image.size": 56, "train.batch_size": 4, "train.log_every": 1, "train.val_every": 1000, "train.save_every": 1000, "train.keep": 50,
            "train.precision": "no", "data.shares": [1.0, 0.0, 0.0], "model.dim": 16}
    return recipe("grounding", data="store", overrides=made | {"train.steps": steps} | {k.replace("__", "."): v for k, v in changes.items()})


def pretrained(steps=9, **changes):
    "The same with pretrained towers: HuBERT thaws after one epoch, DINOv2 after two."
    return small(steps, **dict(model__audio="hubert", model__image="dino", model__head="linear", train__unfreeze_audio=1, train__unfreeze_image=2) | changes)


def weights(run, step):
    "All tensors of a checkpoint, by file and name."
    from safetensors.torch import load_file
    folder = run / f"checkpoints/step_{step:08d}"
    return {f"{f.name}:{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def go_on(recipe, run, step, out):
    "Train on from a checkpoint, as a run that was killed right after it would: in a copy of the folder."
    shutil.copytree(run, out)
    for folder in (out / "checkpoints").glob("step_*"):
        if folder.name > f"step_{step:08d}": shutil.rmtree(folder)
    return fit(recipe, out)


# ---- 1: a clip's features depend on nothing but the clip ----

def check_alone_or_in_company(at):
    torch.manual_seed(0)
    import transformers as hf
    n = [16_000, 16_000, 12_000, 9_000, 16_000, 7_000, 12_000, 5_000]
    audio, keep = torch.zeros(8, 16_000), torch.arange(16_000) < torch.tensor(n)[:, None]
    for i, s in enumerate(n): audio[i, :s] = (i + 1) * 0.1 * torch.randn(s)
    image = torch.randn(3, 3, 56, 56)
    for tower in (encoders.Hubert(hf.HubertModel(hubert("group"))), encoders.Hubert(hf.HubertModel(hubert("layer"))), encoders.ToyAudio(32, 8, 16)):
        model = DenseAligner(tower, encoders.ToyImage(32), dim=16).eval()
        with torch.no_grad():
            places, (tokens, kept) = model.embed_image(image), model.embed_audio(audio, keep)
            scores = similarity.max_mean(tokens, places, kept)
            for i, s in enumerate(n):
                alone, whole = model.embed_audio(audio[i:i + 1, :s], keep[i:i + 1, :s])
                assert whole.all() and kept[i].sum() == whole.shape[1], f"{type(tower).__name__}: clip {i} has another number of tokens in company"
                assert torch.allclose(alone[0], tokens[i, kept[i]], atol=2e-5), f"{type(tower).__name__}: clip {i} has other features in company"
                assert torch.allclose(similarity.max_mean(alone, places)[0], scores[i], atol=2e-5), f"{type(tower).__name__}: clip {i} scores differently in company"


def normalised_together(mp): mp.setattr(encoders, "normalise", lambda audio, keep=None: (audio - audio.mean()) / audio.std())


def padding_goes_through(mp):
    def encode(self, audio, keep=None):
        tokens = self.model(encoders.normalise(audio, keep)).last_hidden_state
        return tokens, torch.arange(tokens.shape[1]) < self.token_lengths(keep.sum(-1))[:, None]
    mp.setattr(encoders.Hubert, "encode", encode)


def padding_counts(mp):
    right = similarity.max_mean
    mp.setattr(similarity, "max_mean", lambda audio, image, keep=None: right(audio, image))


# ---- 2: frozen is frozen ----

def check_frozen_is_frozen(at):
    torch.manual_seed(0)
    tower = encoders.audio_encoder("hubert")
    model = DenseAligner(tower, encoders.ToyImage(32), dim=16)
    tower.freeze()
    model.train()
    assert not any(m.training for m in tower.modules()), "a frozen tower is in training mode"
    x = torch.randn(2, 8_000, requires_grad=True)
    (first, _), (second, _) = tower(x), tower(x)
    assert torch.equal(first, second), "a frozen tower gives other features the second time"
    assert not first.requires_grad, "there is a graph through a frozen tower"
    model.embed_audio(x)[0].sum().backward()
    assert all(p.grad is None for p in tower.parameters()) and model.audio_head.weight.grad is not None
    seen, heard = [], encoders.Hubert.encode

    def recorded(self, *inputs):
        seen.append((self.training, torch.is_grad_enabled() and next(self.parameters()).requires_grad))
        return heard(self, *inputs)
    encoders.Hubert.encode = recorded
    try: run = fit(pretrained(9, train__save_every=3), at / "run")
    finally: encoders.Hubert.encode = heard
    assert seen == [(False, False)] * 3 + [(True, True)] * 6, f"HuBERT thaws after 3 steps of 9; (training, gradient) were {seen}"
    saved = [weights(run.path, step) for step in (3, 6, 9)]
    changed = lambda a, b, tower: any(not torch.equal(a[k], b[k]) for k in a if k.startswith(f"model.safetensors:{tower}."))
    assert [changed(saved[0], saved[1], t) for t in ("audio", "image")] == [True, False], "at step 6 only the audio tower has learned"
    assert changed(saved[1], saved[2], "image"), "after step 6 the image tower learns too"


def frozen_in_training_mode(mp): mp.setattr(encoders.Encoder, "train", nn.Module.train)
def frozen_with_a_graph(mp): mp.setattr(encoders.Encoder, "forward", lambda self, *inputs: self.encode(*inputs))
def never_frozen(mp): mp.setattr(training.Trainer, "unfreeze", lambda self, *a: None)


# ---- 3: the temperature stays in bounds; what isn't finite changes nothing ----

def check_temperature_in_bounds(at):
    for made, parameter, low, high in ((losses.LogScale(), "log_scale", 0, 100), (losses.Band(), "tau", 1 / 16, 4 / 2.3)):
        for far in (50.0, -50.0):
            with torch.no_grad(): getattr(made, parameter).fill_(far)
            factor = made.train()()
            assert factor.isfinite() and low <= factor <= high * (1 + 1e-6), f"{type(made).__name__}: {factor.item():g} is out of bounds"
            assert made.penalty().isfinite()


def free_scale(mp): mp.setattr(losses.LogScale, "forward", lambda self: self.log_scale.exp())
def free_divisor(mp): mp.setattr(losses.Band, "forward", lambda self: 1 / self.tau)


def poisoned(when):
    "A fault of the data: the picture tower answers NaN in some of its calls (counted from 1) while training."
    right, calls = encoders.ToyImage.encode, []

    def encode(self, image):
        calls.append(self.training)
        return right(self, image) * (float("nan") if self.training and sum(calls) in when else 1)
    encoders.ToyImage.encode = encode
    return right


def check_a_bad_step_changes_nothing(at):
    right = poisoned({3})
    try: run = fit(small(5, train__save_every=1), at / "one")
    finally: encoders.ToyImage.encode = right
    before, after, last = (weights(run.path, step) for step in (2, 3, 5))
    assert equal(before, after), "the bad step changed weights, running statistics or the optimizer's state"
    assert all(v.isfinite().all() for v in last.values()) and not equal(after, last)
    assert [line["skipped"] for line in run.metrics] == [0, 0, 1, 1, 1], "one step of five was skipped, and is counted"
    right, said = poisoned(set(range(2, 20))), ""
    try: fit(small(7, train__max_skipped=3), at / "all")
    except RuntimeError as e: said = str(e)
    finally: encoders.ToyImage.encode = right
    assert "not finite in 3 updates in a row" in said and len((at / "all/metrics.jsonl").read_text().splitlines()) == 4, f"training did not stop after 3 bad steps in a row: {said}"


def bad_steps_taken(mp):
    right = torch.optim.AdamW.step

    def step(self, *a, **k):
        self.found_inf = None
        return right(self, *a, **k)
    mp.setattr(torch.optim.AdamW, "step", step)


def bad_steps_for_ever(mp):
    write = training.Trainer.write

    def patient(self, *a):
        self.train = replace(self.train, max_skipped=10**9)
        return write(self, *a)
    mp.setattr(training.Trainer, "write", patient)


# ---- 4: every segment once an epoch ----

def check_every_segment_once(at):
    rng = np.random.default_rng(0)
    worlds = [([f"v{i // 10}" for i in range(600)], 48)] + [([f"v{g}" for g in rng.integers(0, 9, 40)], 7), ([f"v{i}" for i in range(50)], 8)]
    for groups, size in worlds:
        groups, orders = np.array(groups), []
        for seed in (0, 1):
            shares = [VideoSampler(groups, size, seed=seed, rank=r, world=2) for r in (0, 1)]
            whole = VideoSampler(groups, size, seed=seed)
            for epoch in (0, 1):
                drawn = list(whole.set_epoch(epoch))
                assert len(drawn) == len(whole) == -(-len(groups) // whole.batch_size), "len() is not the number of batches"
                every = sorted(i for batch in drawn for i in batch)
                assert len(every) == len(set(every)) == whole.used, "a segment came twice, or was lost"
                assert whole.used == len(groups) - whole.surplus
                assert all(len(set(groups[b])) == len(b) for b in drawn), "two segments of one group met"
                assert max(map(len, drawn)) - min(map(len, drawn)) <= 1, "a batch is smaller than the others"
                split = [list(s.set_epoch(epoch)) for s in shares]
                assert [a + b for a, b in zip(*split, strict=True)] == drawn, "the ranks do not share the batches of one process"
                orders.append(drawn)
        assert len({json.dumps(o) for o in orders}) == 4, "epochs and seeds do not change the order"
    assert VideoSampler([f"v{i // 10}" for i in range(600)], 48).surplus == 0


def one_pass_over_the_videos(mp):
    "As published: while enough videos are left take one segment of each of the next ones, and give up what remains."
    def plan(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        left, out = {g: list(rng.permutation(np.flatnonzero(self.group == g))) for g in range(len(self.count))}, []
        while len(left) >= self.batch_size:
            chosen = rng.choice(list(left), self.batch_size, replace=False)
            out.append(np.array([left[g].pop() for g in chosen]))
            left = {g: rows for g, rows in left.items() if rows}
        return out
    mp.setattr(VideoSampler, "plan", plan)


def blind_to_groups(mp):
    def plan(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.group))
        return [order[b::self.batches] for b in range(self.batches)]
    mp.setattr(VideoSampler, "plan", plan)


def tiny_last_batch(mp):
    right = VideoSampler.plan
    mp.setattr(VideoSampler, "plan", lambda self: right(self) if self.count.max() > 1 else np.split(np.concatenate(right(self)), range(self.batch_size, len(self.group), self.batch_size)))


def ranks_go_their_own_ways(mp):
    right = VideoSampler.plan
    mp.setattr(VideoSampler, "plan", lambda self: right(SimpleNamespace(**{**vars(self), "seed": self.seed + 10 * self.rank})))


# ---- 5: rates follow their schedule, through a resume and to the last step ----

def one_cycle(step, total, peak, warmup, start_div, end_div, start):
    "Half a cosine up, half a cosine down, written down once more."
    if step < start: return 0.0
    x, low = (step - start) / (total - start - 1), peak / end_div
    if x < warmup: x, low = x / warmup, peak / start_div
    else: x = (1 - x) / (1 - warmup)
    return low + (peak - low) * 0.5 * (1 - np.cos(np.pi * x))


def rates_of(train):
    "The rates with which each optimizer step was taken: [{group: rate}], watched from outside."
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *a, **k):
        seen.append({g["kind"]: g["lr"] for g in self.param_groups})
        return step(self, *a, **k)
    torch.optim.AdamW.step = watched
    try: return train(), seen
    finally: torch.optim.AdamW.step = step


def check_rates(at, accumulate=1):
    half = 16 // accumulate // 2 + 1
    made = pretrained(None, train__epochs=4, train__accumulate=accumulate, train__batch_size=3, train__save_every=half, train__warmup=0.25, train__backbone_warmup=0.4,
                      train__lr=1e-3, train__backbone_lr=1e-4)
    epoch = 4 // accumulate  # optimizer steps an epoch
    total, t = 4 * epoch, made.train
    run, seen = rates_of(lambda: fit(made, at / "whole"))
    assert run.step == total == len(seen), f"{len(seen)} optimizer steps of {run.step}; needed {total}: 4 epochs of {epoch}"
    for kind, peak, warmup, start in (("fresh", t.lr, t.warmup, 0), ("audio", t.backbone_lr, t.backbone_warmup, epoch), ("image", t.backbone_lr, t.backbone_warmup, 2 * epoch)):
        due = [one_cycle(i, total, peak, warmup, t.start_div, t.end_div, start) for i in range(total)]
        assert np.allclose([s[kind] for s in seen], due, rtol=1e-6), f"{kind}: {[s[kind] for s in seen]}, due {due}"
        assert abs(seen[-1][kind] - peak / t.end_div) < 1e-9, f"{kind}: the last step's rate is not the schedule's end"
    _, rest = rates_of(lambda: go_on(made, run.path, half, at / "again"))
    assert rest == seen[half:], "after a resume the rates are others"


def check_rates_when_accumulating(at): check_rates(at, 2)


def backbones_race_after_a_resume(mp):
    resumed, load, rates = [], training.load_checkpoint, training.set_rates

    def set_rates(optimizer, *a):
        rate = rates(optimizer, *a)
        for g in optimizer.param_groups: g["lr"] *= 6 if resumed and g["kind"] != "fresh" else 1
        return rate
    mp.setattr(training, "load_checkpoint", lambda *a: (resumed.append(True), load(*a))[1])
    mp.setattr(training, "set_rates", set_rates)


def schedule_in_batches(mp):
    right = training.set_rates
    mp.setattr(training, "set_rates", lambda optimizer, step, total, *a: right(optimizer, step, 2 * total, *a))


# ---- 6: a resume is exact ----

def check_resume(at):
    made = pretrained(8, train__save_every=2, train__unfreeze_audio=0, train__unfreeze_image=1)
    whole = fit(made, at / "whole")
    for step in (2, 4, 6):  # in the first epoch, in the second, and at the start of the third
        again = go_on(made, whole.path, step, at / f"from{step}")
        same = [[(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in run.metrics] for run in (whole, again)]
        assert len(same[0]) == 8 and same[0] == same[1], f"resumed at {step}, losses differ from step {next((a[0] for a, b in zip(*same, strict=True) if a != b), None)} on"
        assert equal(weights(whole.path, 8), weights(again.path, 8)), f"resumed at {step}, weights differ"


def generators_forgotten(mp): mp.setattr(checkpoints, "set_rng_state", lambda state: None)


def place_in_the_epoch_forgotten(mp):
    right = VideoSampler.set_epoch
    mp.setattr(VideoSampler, "set_epoch", lambda self, epoch, start=0: right(self, epoch, 0))


def moments_forgotten(mp):
    load = checkpoints.load_checkpoint

    def forgetful(folder, model, temperature, optimizer, *a, **k):
        state = load(folder, model, temperature, optimizer, *a, **k)
        optimizer.state.clear()
        return state
    mp.setattr(training, "load_checkpoint", forgetful)


# ---- 7: a large batch in pieces is the large batch ----

def check_cached_gradients(at):
    "Towers with dropout, layer drop and SpecAugment on; what is compared is the batch whose graphs were all held, with the same draws."
    torch.manual_seed(0)
    model = DenseAligner(encoders.audio_encoder("hubert"), encoders.image_encoder("dino"), dim=8, head="centred").double().train()
    objective = objectives.Grounding(ModelConfig(dim=8), LossConfig(pressure=0.1)).double()
    batch = dict(audio=torch.randn(6, 8_000).double(), keep=torch.ones(6, 8_000, dtype=torch.bool), image=torch.randn(6, 3, 56, 56).double())
    named = [*model.named_parameters(), *objective.named_parameters()]

    def step(how):
        for _, p in named: p.grad = None
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        return how().item(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in named])

    def held():
        parts = [gradients.encode(model, part, False) for part in gradients.pieces(batch, 3)]
        loss, _ = objective(model.project({k: torch.cat([x[k] for x in parts]) for k in parts[0]}), batch)
        loss.backward()
        return loss.detach()
    (a, whole), (b, cut) = step(held), step(lambda: gradients.cached_backward(model, objective, batch, 3)[0])
    assert abs(a - b) < 1e-9, f"another loss: {b:.4f} in pieces, {a:.4f} of the batch"
    error = ((whole - cut).norm() / whole.norm()).item()
    assert error < 1e-6, f"another gradient, by {error:.1e} of its length"


def small_batches_added_up(mp):
    "Plain accumulation under another name: each piece has its own few negatives."
    def added(model, objective, batch, n, **how):
        found = [gradients.backward(model, objective, part, share=1 / n) for part in gradients.pieces(batch, n)]
        return torch.stack([loss for loss, _ in found]).mean(), found[0][1]
    mp.setattr(gradients, "cached_backward", added)


def dice_rolled_again(mp): mp.setattr(gradients, "replay", lambda *_: None)


def numpy_forgotten(mp):
    "Dropout is replayed, SpecAugment, which draws from NumPy, is not."
    mp.setattr(gradients.np.random, "set_state", lambda state: None)


# ---- 8: a broken file is named, never made up ----

def check_broken_files(at):
    for i in range(3): square(at / f"src/good{i}.mp4", i, 1)
    data = (at / "src/good0.mp4").read_bytes()
    (at / "src/cut.mp4").write_bytes(data[:len(data) // 2])
    (at / "src/empty.mp4").write_bytes(b"")
    square(at / "src/silent.mp4", 4, 1, torch.zeros(48_000))
    write_video(at / "src/soundless.mp4", torch.full((25, 3, 64, 64), 90, dtype=torch.uint8), 25)
    bad = {"cut.mp4", "empty.mp4", "silent.mp4", "soundless.mp4"}
    report = store.prepare(at / "src", at / "store", recipe=StoreConfig(workers=0))
    kept = store.open_store(at / "store")
    assert {Path(p).name for p, _ in report.broken} == bad and report.n_ok == 3, f"{report.broken} are named as broken"
    assert set(kept["source"][:]) == {f"good{i}.mp4" for i in range(3)}, "a row was made up for a broken file"
    assert all(len(why) > 10 for _, why in report.broken) and read_json(at / "store/store.json")["counts"]["broken"] == 4
    silent = store.prepare(at / "src", at / "quiet", recipe=StoreConfig(workers=0, sound="optional"))
    assert {Path(p).name for p, _ in silent.broken} == {"cut.mp4", "empty.mp4"}, "where no sound is needed, a clip without any is good"
    for i in range(20): (at / f"src/void{i}.mp4").write_bytes(b"")
    said = ""
    try: store.prepare(at / "src", at / "many", recipe=StoreConfig(workers=0))
    except ValueError as e: said = str(e)
    assert "24 of 27 files are broken" in said and "void7.mp4" in said and "soundless.mp4" in said, f"too many broken files must stop with their list; it said {said!r}"


def black_and_silent(mp):
    "As published: what cannot be read becomes a black picture and silence."
    right = rows.rows_of

    def rows_of(path, name, config, dubs=None, left_out=None):
        try: yield from right(path, name, config, dubs, left_out)
        except (ValueError, OSError):
            row = rows.one_row(0.0, 1.0, np.array([0.5]), torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [torch.zeros(16_000)], None, config)
            video = name.rpartition(".")[0]
            yield dict(row, segment=0, group=video, video_id=video, source=name, title=video, content=video, rate_hz=16_000, tracks=["en"])
    mp.setattr(store, "rows_of", rows_of)


def no_limit(mp): mp.setattr(store, "check_broken", lambda *a: None)


# ---- 9: sound to its end, pictures at their times ----

def check_times(at):
    n, late = 16, 0.25
    shown = late + torch.tensor([0.0, 0.04, 0.08, 0.3, 0.5, 0.52, 0.54, 0.56, 0.58, 0.6, 0.9, 1.2, 1.24, 1.28, 1.32, 1.6])  # a variable rate, and a start that isn't 0
    sound = tone(2, 0.05)
    sound[-960:] = 0.8 * torch.sin(torch.arange(960) * 0.2)  # the last 20 ms are loud
    with VideoWriter(at / "src/clip.mp4", (64, 64), 25, {"en": sound}) as w:
        for i, t in enumerate(shown): w.add(torch.full((3, 64, 64), 10 + 15 * i, dtype=torch.uint8), float(t), float(2 - t) if i == n - 1 else None)
    frames, times = media.decode_frames(at / "src/clip.mp4")
    assert times.shape == shown.shape and (times - shown).abs().max() < 1e-3, f"pictures are shown at {shown.tolist()}, decoded as {times.tolist()}"
    number = lambda frame: ((frame.float().mean((-1, -2, -3)) - 10) / 15).round().long()
    assert number(frames).tolist() == list(range(n))
    for at_s, due in ((0.45, 2), (0.6, 3), (1.1, 9), (1.9, 15)):  # the picture on screen at that moment
        frame, time = media.decode_frames(at / "src/clip.mp4", times_s=[at_s])
        assert number(frame).item() == due and abs(time.item() - shown[due].item()) < 1e-3, f"at {at_s} s picture {due} is on screen, not {number(frame).item()} of {time.item():.3f} s"
    heard = media.decode_audio(at / "src/clip.mp4", 16_000)
    assert len(heard) == 32_000 and heard[-240:].abs().max() > 0.5, f"{len(heard)} samples of 32000, the last 15 ms peak at {heard[-240:].abs().max():.2f}"
    store.prepare(at / "src", at / "store", recipe=StoreConfig(seconds=2.0, fps=5, size=64, workers=0))
    data = batches.ClipDataset(store.open_store(at / "store"), view=batches.View(image=batches.ImageView(size=56, flip=0, colour=0, mean=(0, 0, 0), std=(1, 1, 1))))
    for epoch in range(12):
        clip = data[0, epoch]
        assert abs(float(clip["time"]) - shown[number(255 * clip["image"])].item()) < 1e-3, f"picture {number(255 * clip['image'])} comes with time {float(clip['time']):.3f}"


def decoder_not_flushed(mp):
    right = decoding._placed
    mp.setattr(decoding, "_placed", lambda *a: (lambda parts, rate: (parts[:-1], rate))(*right(*a)))


def times_by_counting(mp):
    right = decoding.decode_frames

    def decode_frames(path, times_s=None, **k):
        frames, _ = right(path)
        index = torch.arange(len(frames)) if times_s is None else (25 * torch.tensor(times_s)).round().long().clamp(max=len(frames) - 1)
        return frames[index], index / 25
    mp.setattr(media, "decode_frames", decode_frames)


def time_that_was_asked_for(mp):
    right = rows.decode_frames
    mp.setattr(rows, "decode_frames", lambda path, times_s, size: (right(path, times_s=times_s, size=size)[0], torch.as_tensor(times_s, dtype=torch.float64)))


# ---- 10: a heat map says what it means ----

def check_heat(at):
    heat = torch.zeros(100, 4, 4)
    heat[:, 0, 0], heat[:, 3, 3] = -1.0, 1.0  # against the sound above on the left, with it below on the right
    heat[25:50] /= 4                          # weaker in the second half second
    sound = tone(2, rate_hz=16_000)
    sound[16_000:] = 0                        # and then silence, in which the network still answers
    frame = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    film, times = decode_frames(viz.heat_video(frame, heat, sound, at / "heat.mp4"))
    bare, _ = decode_frames(viz.heat_video(frame, 0 * heat, sound, at / "bare.mp4", vmax=1.0))
    added = (film.float() - bare.float())[:, :, :336, :336]
    mean = lambda t, y, x: added[int(t * 25), :, 84 * y + 20:84 * y + 64, 84 * x + 20:84 * x + 64].mean((1, 2))
    cold, warm, nothing = mean(0.2, 0, 0), mean(0.2, 3, 3), mean(0.2, 0, 3)
    assert cold[2] - cold[0] > 40, f"negative similarity is not cold: {cold.tolist()}"
    assert warm[0] - warm[2] > 40, f"positive similarity is not warm: {warm.tolist()}"
    assert nothing.abs().max() < 6, f"no similarity has a colour: {nothing.tolist()}"
    for y, x in ((0, 0), (3, 3)):
        strong, weak = mean(0.2, y, x).abs().max(), mean(0.8, y, x).abs().max()
        assert weak < 0.6 * strong, f"a quarter of the similarity looks as strong: {weak:.0f} beside {strong:.0f}; the scale is not shared over time"
        assert mean(1.6, y, x).abs().max() < 6, f"silence has a colour: {mean(1.6, y, x).tolist()}"
    panel = film[:, :, 40:320, 340:].float()
    saturated = (panel[0].amax(0) - panel[0].amin(0)) > 60
    warm_part, cold_part = (saturated & (sign * (panel[0, 0] - panel[0, 2]) > 40) for sign in (1, -1))
    assert warm_part.any() and cold_part.any() and warm_part.nonzero()[:, 0].max() < cold_part.nonzero()[:, 0].min(), "there is no colour bar, warm above and cold below"
    assert (panel - panel[:1]).abs().mean() < 1, "the printed scale changes over time"


def stretched_each_moment(mp):
    right = viz._stretched

    def stretched(heat, size):
        heat = torch.as_tensor(heat).float()
        return right((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6), size)
    mp.setattr(viz, "_stretched", stretched)


def each_moment_its_own_scale(mp):
    right = viz._stretched
    mp.setattr(viz, "_stretched", lambda heat, size: right(torch.as_tensor(heat) / torch.as_tensor(heat).abs().max().clamp(min=1e-6), size))


def negative_is_nothing(mp):
    right = viz._stretched
    mp.setattr(viz, "_stretched", lambda heat, size: right(torch.as_tensor(heat).clamp(min=0), size))


def silence_answers(mp): mp.setattr(viz, "_heard", lambda heat, *a: heat)
def no_colour_bar(mp):
    right = viz._scale_panel
    mp.setattr(viz, "_scale_panel", lambda *a: np.full_like(right(*a), 20))


# ---- 11: videos play in a browser ----

def boxes(path):
    "The names of an mp4's top-level boxes, in order."
    data, i, names = Path(path).read_bytes(), 0, []
    while i < len(data):
        size = int.from_bytes(data[i:i + 4], "big")
        names.append(data[i + 4:i + 8].decode()); i += size or len(data)
    return names


def check_videos_play(at):
    written = write_video(at / "plain.mp4", torch.randint(0, 255, (5, 3, 63, 81), dtype=torch.uint8), 25, {"en": tone(0.2)})
    heat = viz.heat_video(torch.full((1, 3, 40, 56), 90, dtype=torch.uint8), torch.rand(10, 2, 2), tone(0.2, rate_hz=16_000), at / "heat.mp4")
    for path in (written, heat, media.mux(written, {"fr": tone(0.2)}, at / "muxed.mp4")):
        with av.open(str(path)) as c:
            v, a = c.streams.video[0].codec_context, c.streams.audio[0].codec_context
            said = (v.name, v.pix_fmt, v.profile, a.name, a.profile)
            assert v.name == "h264" and v.pix_fmt == "yuv420p" and v.profile in ("Baseline", "Constrained Baseline", "Main", "High"), f"{path.name}: {said}"
            assert a.name == "aac" and a.profile == "LC" and v.width % 2 == v.height % 2 == 0, f"{path.name}: {said}"
        order = boxes(path)
        assert order[0] == "ftyp" and order.index("moov") < order.index("mdat"), f"{path.name}: {order}; a browser must fetch all of it before it plays"
        assert probe(path).has_video


def full_colour(mp):
    right = VideoWriter.__init__

    def init(self, *a, **k):
        right(self, *a, **k)
        self.v.codec_context.pix_fmt = "yuv444p"
    mp.setattr(VideoWriter, "__init__", init)


def other_container(change):
    "`media._mp4`, whose tracks get another codec or other options."
    right = media._mp4

    class Other:
        def __init__(self, c): self.c = c
        def __getattr__(self, name): return getattr(self.c, name)
        def add_stream(self, codec, options=None, **k):
            codec, options = change(codec, options)
            return self.c.add_stream(codec, options=options, **k)

    @contextlib.contextmanager
    def opened(path):
        with right(path) as c: yield Other(c)
    return opened


def other_codecs(mp):
    "HEVC, which most browsers on most systems do not play, and Opus, which some do not play in an mp4."
    mp.setattr(media, "_mp4", other_container(lambda codec, options: ({"libx264": "libx265", "aac": "libopus"}[codec], None)))


def index_at_the_end(mp):
    right = media.av.open
    mp.setattr(media, "av", SimpleNamespace(**{k: getattr(av, k) for k in ("AudioFrame", "VideoFrame", "FFmpegError")}, open=lambda *a, options=None, **k: right(*a, **k)))


# ---- 12: negatives that are none ----

def check_false_negatives(at):
    torch.manual_seed(0)
    scores, own = torch.randn(5, 5, requires_grad=True), torch.eye(5, dtype=torch.bool)
    label, sounds, pictures = torch.tensor([0, 1, 0, -1, 1]), torch.randn(5, 8), torch.randn(5, 8)
    sounds[2], pictures[4] = 2 * sounds[0], pictures[1] + 0.01  # clips 0 and 2, and 1 and 4: one class, and as good as the same; of clip 3 nothing is known
    same = torch.tensor([[i != j and {i, j} in ({0, 2}, {1, 4}) for j in range(5)] for i in range(5)])
    for how, found in (("label", negatives.same_label(label)), ("embedding", negatives.too_alike(sounds, pictures, 0.99))):
        assert torch.equal(found, same), f"by {how}: {found.nonzero().tolist()} are no negatives of each other; needed {same.nonzero().tolist()}"
        loss = losses.info_nce(scores, 3.0, negatives.negative_weights(found, 0))
        by_hand = 0
        for i in range(5):
            for row in (scores[i], scores[:, i]):
                by_hand = by_hand + (torch.logsumexp(3 * row[~same[i]], 0) - 3 * row[i]) / 10
        assert torch.allclose(loss, by_hand, atol=1e-6), f"by {how}: false negatives count: the loss is {loss.item():.4f}, without them {by_hand.item():.4f}"
        (pull,) = torch.autograd.grad(loss, scores)
        assert (pull[same] == 0).all() and (pull[~same & ~own] > 0).all() and (pull[own] < 0).all()
        half = losses.info_nce(scores, 3.0, negatives.negative_weights(found, 0.5))
        assert loss < half < losses.info_nce(scores, 3.0), "down-weighted negatives count as much as all, or not at all"


def everything_is_a_negative(mp):
    right = losses.info_nce
    mp.setattr(losses, "info_nce", lambda scores, scale=1.0, weight=None: right(scores, scale))


def unknown_is_a_class(mp): mp.setattr(negatives, "same_label", lambda labels: (labels.clamp(min=0)[:, None] == labels.clamp(min=0)) & ~torch.eye(len(labels), dtype=torch.bool))


def lengths_count(mp): mp.setattr(negatives, "normalize", lambda x, dim: x)  # products instead of cosines


# ---- each check holds, and fails where its fault is put back ----

TRAPS = [  # (number, check, {fault: what the check then says})
    (1, check_alone_or_in_company, {normalised_together: "other features in company", padding_goes_through: "other features in company", padding_counts: "scores differently"}),
    (2, check_frozen_is_frozen, {frozen_in_training_mode: "in training mode", frozen_with_a_graph: "a graph through", never_frozen: "thaws after 3 steps"}),
    (3, check_temperature_in_bounds, {free_scale: "out of bounds", free_divisor: "out of bounds"}),
    (3, check_a_bad_step_changes_nothing, {bad_steps_taken: "changed weights", bad_steps_for_ever: "did not stop"}),
    (4, check_every_segment_once, {one_pass_over_the_videos: "not the number of batches", blind_to_groups: "of one group met", tiny_last_batch: "smaller than the others",
                                   ranks_go_their_own_ways: "do not share"}),
    (5, check_rates, {backbones_race_after_a_resume: "after a resume"}),
    (5, check_rates_when_accumulating, {schedule_in_batches: "fresh: "}),
    (6, check_resume, {generators_forgotten: "losses differ", place_in_the_epoch_forgotten: "losses differ", moments_forgotten: "losses differ"}),
    (7, check_cached_gradients, {small_batches_added_up: "another loss", dice_rolled_again: "another gradient", numpy_forgotten: "another gradient"}),
    (8, check_broken_files, {black_and_silent: "named as broken", no_limit: "must stop"}),
    (9, check_times, {decoder_not_flushed: "the last 15 ms", times_by_counting: "decoded as", time_that_was_asked_for: "comes with time"}),
    (10, check_heat, {stretched_each_moment: "not cold", each_moment_its_own_scale: "not shared over time", negative_is_nothing: "not cold",
                      silence_answers: "silence has a colour", no_colour_bar: "no colour bar"}),
    (11, check_videos_play, {full_colour: "yuv444p", other_codecs: "hevc", index_at_the_end: "fetch all of it"}),
    (12, check_false_negatives, {everything_is_a_negative: "false negatives count", unknown_is_a_class: "by label", lengths_count: "by embedding"}),
]


@pytest.fixture
def at(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(training.Trainer, "draw", lambda self: None)  # videos of fixed clips at the end of a run: not asked for here, and slow
    return tmp_path


@pytest.mark.quick
@pytest.mark.parametrize("check", [pytest.param(c, id=f"{n}-{c.__name__[6:]}") for n, c, _ in TRAPS])
def test_trap_is_avoided(check, at): check(at)


@pytest.mark.parametrize("check, fault, says", [pytest.param(c, f, says, id=f"{n}-{f.__name__}") for n, c, faults in TRAPS for f, says in faults.items()])
def test_check_fails_with_its_fault_back(check, fault, says, at, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=says): check(at)


# ---- the same pictures, the same bytes ----

def check_bytes(at):
    import ctypes
    fresh_memory = ctypes.CDLL(None).mallopt
    frames, files = draw(plan("isolated", 0, 1))[0][:75], set()
    for byte in (255, 85):  # the C library fills what it hands out with the complement: nought, and 10101010
        fresh_memory(-6, byte)
        try: files.add(write_video(at / "video.mp4", frames, 25, preset="medium").read_bytes())
        finally: fresh_memory(-6, 0)
    assert len(files) == 1, "what lay in memory before is in the file"


def macroblock_tree(mp):
    "x264's default, which reads memory that nobody has written."
    mp.setattr(media, "_mp4", other_container(lambda codec, options: (codec, options | {"mbtree": "1"})))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to fill fresh memory")
def test_the_same_pictures_the_same_bytes(at, monkeypatch):
    check_bytes(at)
    macroblock_tree(monkeypatch)
    with pytest.raises(AssertionError, match="what lay in memory"): check_bytes(at)
