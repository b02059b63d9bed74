"""A token cache under fire: killed while it writes, built by two at once, and used for a loss that must not notice."""
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import avnb.tokens as tokens_module
from avnb.batches import ClipDataset, ImageView, InOrder, View, loader
from avnb.core import read_json
from avnb.encoders import ToyAudio, ToyImage, build_encoder
from avnb.losses import GroundingLoss
from avnb.models import DenseAligner
from avnb.rows import StoreConfig
from avnb.similarity import max_mean
from avnb.store import open_store, prepare
from avnb.tokens import TokenCache, cached, encode, open_caches, speed_up
from avnb.toy import make_toy

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
HUBERT = {"kind": "hubert", "pad": 80, "config": dict(**SMALL, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)}
DINO = {"kind": "dinov2", "config": dict(**SMALL, mlp_ratio=2, image_size=56, patch_size=14)}
VIEW = View(image=ImageView(size=56)).still()
pytestmark = pytest.mark.quick

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_tokens as t
from avnb import tokens
torch.set_num_threads(1)
folder, store, dies = Path(sys.argv[2]), t.open_store(sys.argv[3]), int(sys.argv[4])
plain, calls = tokens.write_at, []
def write_at(path, offset, x):
    calls.append(path.name)
    if len(calls) == dies:
        plain(path, offset, tokens.np.ascontiguousarray(x).reshape(-1)[:x.size//2]); os.kill(os.getpid(), signal.SIGKILL)
    plain(path, offset, x)
tokens.write_at = write_at
tokens.TokenCache.open(folder, store=store, encoder=t.towers()[0], view=t.VIEW, block=8)
"""


def towers(seed=0):
    torch.manual_seed(seed)
    return build_encoder(HUBERT).freeze(), build_encoder(DINO).freeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens")
    prepare(make_toy(out / "raw", 2, languages=("en",)), out / "store", recipe=StoreConfig(workers=0))
    return out


@pytest.fixture(scope="module")
def store(place): return open_store(place / "store")


def first(store, n=16, view=VIEW):
    return next(iter(loader(ClipDataset(store, None, view), InOrder(len(store), n), workers=0)))


def child(place, folder, dies=0):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), str(place / "store"), str(dies)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_and_gone_on(place, store, monkeypatch):
    "SIGKILL in the middle of a block; then two at once: one goes on, the other waits; the file is the unbroken one's."
    ask = dict(store=store, encoder=towers()[0], view=VIEW, block=8)
    whole = TokenCache.open(place / "whole", **ask)
    dead = child(place, place / "killed", dies=6)  # two writes a block: keep, tokens
    assert dead.wait(200) == -signal.SIGKILL, dead.stderr.read()
    folder = place / "killed" / whole.folder.name
    assert read_json(folder / "tokens.json")["done"] == 16, "two whole blocks, the third was in hand"
    calls, plain = [], tokens_module.write_at
    monkeypatch.setattr(tokens_module, "write_at", lambda path, *x: (calls.append(path.name), plain(path, *x)))
    with ThreadPoolExecutor(2) as pool:  # file locks exclude threads as they do processes: each opens the file anew
        both = [f.result() for f in [pool.submit(TokenCache.open, place / "killed", **ask) for _ in range(2)]]
    assert calls.count("tokens.bin") == -(-len(store) // 8) - 2
    for name in ("tokens.bin", "keep.bin"): assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert (both[0].map == both[1].map).all()


def test_damage_is_not_read(place, store):
    "A file of another size, or a label that is another cache's, is made again."
    ask = dict(store=store, encoder=towers()[1], view=VIEW, kind="image", block=8)
    cache = TokenCache.open(place / "damaged", **ask)
    good, label = (cache.folder / "tokens.bin").read_bytes(), (cache.folder / "tokens.json").read_bytes()
    (cache.folder / "tokens.bin").write_bytes(good[:-100])
    assert (TokenCache.open(place / "damaged", **ask).folder / "tokens.bin").read_bytes() == good
    (cache.folder / "tokens.json").write_bytes(label.replace(b'"weights": "', b'"weights": "0'))
    (cache.folder / "tokens.bin").write_bytes(bytes(len(good)))
    assert (TokenCache.open(place / "damaged", **ask).folder / "tokens.bin").read_bytes() == good


@pytest.mark.parametrize("change", ["weights", "view", "store"])
def test_stale_keys_are_not_read(place, store, change):
    "Other weights, another view or another store: another folder."
    ask = dict(store=store, encoder=towers()[1], view=VIEW, kind="image", rows=range(4))
    old = TokenCache.open(place / "stale", **ask)
    if change == "weights": ask["encoder"] = towers(seed=1)[1]
    if change == "view": ask["view"] = replace(VIEW, image=replace(VIEW.image, size=70))
    if change == "store":
        prepare(make_toy(place / "raw2", 1, seed=1, languages=("en",)), place / "store2", recipe=StoreConfig(workers=0))
        ask["store"] = open_store(place / "store2")
    new = TokenCache.open(place / "stale", **ask)
    assert new.folder != old.folder
    fresh = encode(ask["encoder"], first(ask["store"], 4, ask["view"]), "image")[0]
    assert (new.tokens(range(4)) - fresh).abs().max() < 5e-3


@pytest.mark.parametrize("dtype,limit", [("float32", 1e-5), ("float16", 3e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_does_not_notice(place, store, dtype, limit, seed):
    "A HuBERT and a DINOv2, 16 clips, cosine and temperature .07, with pressure: the loss with cached tokens is the loss without; half precision is seen."
    torch.manual_seed(seed)
    model, loss = DenseAligner(*towers(seed), dim=64), GroundingLoss(pressure=.15)
    batch = first(store)
    def step(b):
        tokens, keep = (b["audio_tokens"], b["audio_keep"]) if "audio_tokens" in b else encode(model.audio, b, "audio")
        patches = b["image_tokens"] if "image_tokens" in b else encode(model.image, b, "image")[0]
        a, v = (torch.nn.functional.normalize(h(x), dim=-1) for h, x in ((model.audio_head, tokens), (model.image_head, patches)))
        return loss(*max_mean(a, v, keep, pressure=True))[0]
    caches = open_caches(place / f"loss{seed}", model, store=store, view=VIEW, dtype=dtype)
    plain, kept = step(batch), step(cached(batch, caches))
    assert abs(plain - kept).item() <= limit, f"{dtype}: {abs(plain - kept):.1e}"
    print(f"{dtype} seed {seed}: loss differs by {abs(plain - kept):.1e}; {speed_up(step, batch, caches, n=2)['times']:.0f} times as fast")


def test_toy_towers_too(place, store):
    "Frozen toy towers keep their running statistics; every token is the tower's."
    torch.manual_seed(0)
    model = DenseAligner(ToyAudio(32).freeze(), ToyImage(32).freeze(), dim=16)
    batch = first(store)
    b = cached(batch, open_caches(place / "toy", model, store=store, view=VIEW, dtype="float32", rows=np.arange(16)))
    tokens, keep = encode(model.audio, batch, "audio")
    assert b["audio_keep"].equal(keep) and torch.allclose(b["audio_tokens"], tokens, atol=1e-5)
    assert torch.allclose(b["image_tokens"], encode(model.image, batch, "image")[0], atol=1e-5)
