"""The towers at their published sizes: names, shapes, counts, tables on their true grids, and one file of the published format."""
import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from avnb.duals import DualEncoder
from avnb.mvit import audio_config, audio_tower, layout, relative, table_length, video_config, video_tower
from avnb.published import load_lssd, save_lssd, weights_size

NAMES = json.loads(gzip.decompress((Path(__file__).parent / "lssd_names.json.gz").read_bytes()))
COUNTS = {"S": (34.20, 34.04), "B": (50.83, 50.61)}  # millions, without overlap
CONFIGS = {"video": video_config, "audio": audio_config}


def pair(label: str) -> dict[str, torch.nn.Module]:
    "Both towers of a list's size, without making a weight."
    size, _, overlap = label.partition("_")
    with torch.device("meta"): return {"video": video_tower(size, bool(overlap)), "audio": audio_tower(size, bool(overlap))}


@pytest.mark.quick
@pytest.mark.parametrize("label", NAMES)
def test_names_shapes_and_types_are_those_published(label):
    towers = pair(label)
    ours = [[f"backbone.net.{kind}.{name}", list(x.shape), str(x.dtype).removeprefix("torch.")] for kind, tower in towers.items() for name, x in tower.state_dict().items()]
    assert ours == NAMES[label]  # in the same order too
    for kind, tower in towers.items():
        start = f"backbone.net.{kind}."
        published = {name.removeprefix(start): torch.empty(shape, dtype=getattr(torch, kept), device="meta") for name, shape, kept in NAMES[label] if name.startswith(start)}
        tower.load_state_dict(published, strict=True, assign=True)
    assert weights_size({name: x.shape for name, x in towers["video"].state_dict().items()}) == (label[0], label.endswith("overlap"))


@pytest.mark.quick
@pytest.mark.parametrize("size", COUNTS)
def test_counts_are_those_published(size):
    assert tuple(round(sum(p.numel() for p in tower.parameters()) / 1e6, 2) for tower in pair(size).values()) == COUNTS[size]


def true_grids(config) -> list[tuple]:
    "What attention meets in each block: (queries' grid, keys' grid), each pooling rounded up."
    grid, out = layout(config)[0]["grid"], []
    for block in layout(config):
        q, k = (tuple(math.ceil(n / s) for n, s in zip(grid, block[name], strict=True)) for name in ("q_stride", "kv_stride"))
        out.append((q, k))
        grid = q
    return out


def literal_entry(table: list[float], i: int, j: int, q: int, k: int) -> float:
    "One table entry for query i of q and key j of k, by the text: resize to 2*max - 1 by interpolation, then count on the finer grid."
    n = 2 * max(q, k) - 1
    if n != len(table):
        spots = [min(max((x + 0.5) * len(table) / n - 0.5, 0), len(table) - 1) for x in range(n)]
        table = [table[int(s)] + (s - int(s)) * (table[min(int(s) + 1, len(table) - 1)] - table[int(s)]) for s in spots]
    return table[int(i * max(k / q, 1) - j * max(q / k, 1) + (k - 1) * max(q / k, 1))]


@pytest.mark.quick
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("label", [*NAMES, "toy"])
def test_tables_on_their_true_grids(kind, label):
    "Tables sized on rounded-down grids, read on rounded-up ones, against a slow reading."
    size, _, overlap = label.partition("_")
    config, resized, seen = CONFIGS[kind](size, bool(overlap)), 0, set()
    for block, (q, k) in zip(layout(config), true_grids(config), strict=True):
        lengths = table_length(block["grid"], block["q_stride"], block["kv_stride"])
        for axis, length in enumerate((lengths[0], lengths[1], lengths[1])):
            if axis == 0 and kind == "audio": continue
            case = (length, q[axis], k[axis])
            resized += length != 2 * max(case[1:]) - 1
            if case in seen: continue
            seen.add(case)
            table = torch.rand(length, 1, dtype=torch.float64)
            slow = [[literal_entry(table[:, 0].tolist(), i, j, *case[1:]) for j in range(case[2])] for i in range(case[1])]
            torch.testing.assert_close(relative(table, *case[1:])[..., 0], torch.tensor(slow, dtype=torch.float64), atol=1e-12, rtol=0)
    if label in NAMES: assert (resized == 2 * config.depth) if kind == "audio" else (resized == (0 if overlap else 2 * (config.depth - 1 - config.grow[-1])))


def test_size_s_runs_and_comes_back_bit_equal(tmp_path):
    "A clip through both towers of size S, through the published format and back."
    torch.manual_seed(0)
    model = DualEncoder(video_tower("S"), audio_tower("S"))
    film, mel = torch.rand(1, 3, 16, 224, 224), torch.randn(1, 1, 96, 288) * 20 - 40
    with torch.no_grad():
        model.train()(dict(video=film[None], audio=mel[None]))  # statistics that are not those of the start
        v, a = model.eval().embed_video(film), model.embed_audio(mel)
        assert v.shape == a.shape == (1, 768) and v.isfinite().all() and a.isfinite().all()
        state = {name: x.clone() for name, x in model.state_dict().items() if "_head." not in name}
        path = save_lssd(model, tmp_path)
        del model
        back = load_lssd(path)
        for name, x in state.items(): assert torch.equal(x, back.state_dict()[name]), name
        assert torch.equal(back.embed_video(film), v) and torch.equal(back.embed_audio(mel), a)
    assert {name for name, _, _ in NAMES["S"]} == set(torch.load(tmp_path / "checkpoint.pt", weights_only=True, mmap=True)["model"])


@pytest.mark.quick
def test_a_step_of_the_toy_moves_everything_that_can_move():
    "Both ways of saving memory and time at once: checkpointed blocks in half precision, several views a clip."
    torch.manual_seed(0)
    model = DualEncoder(video_tower("toy", checkpoint=True), audio_tower("toy", checkpoint=True), dim=16, head="normed").train()
    with torch.autocast("cpu", torch.bfloat16):
        z = model(dict(video=torch.rand(3, 2, 3, 16, 64, 64), audio=torch.randn(3, 2, 1, 96, 288)))
    assert z["video"].shape == z["audio"].shape == (3, 2, 16) and z["video"].dtype == torch.float32
    (z["video"] * z["audio"].roll(1, 0)).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
