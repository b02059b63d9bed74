"""What each mode of training promises, on a whole run: what learns, when, from which tokens, and what is kept."""
import json

import numpy as np
import pytest
import torch
from places import workplace
from safetensors.torch import load_file
from test_kills import LATE, MODES, TOWERS, place  # noqa: F401

from avnb.adapters import is_adapter, merge
from avnb.checkpoints import checkpoints, load_run
from avnb.recipes import recipe
from avnb.training import Trainer, fit

STEPS = 8


def made(place, steps=STEPS, **more):  # noqa: F811
    chosen = {"train.batch_size": 6, "train.val_every": 100, "train.log_every": 1, "store.fps": 2, **TOWERS, **more}
    chosen |= {k: str(place / chosen[k]) for k in ("model.audio", "model.image")}
    return recipe("grounding", data=place / "store", steps=steps, save_every=2, overrides=chosen)


@pytest.fixture(autouse=True)
def elsewhere(place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(workplace(tmp_path))


def test_with_adapters_only_they_and_the_heads_change(place, tmp_path):  # noqa: F811
    r = made(place, **{"model.lora_image": 2, "model.lora_audio": 2, "train.unfreeze_audio_step": 2, "train.unfreeze_image_step": 2})
    before = {k: v.clone() for k, v in Trainer(r, tmp_path / "unused").model.state_dict().items()}
    run = fit(r, tmp_path / "run")
    model = run.model("last")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(is_adapter(k) or "_head." in k for k in changed)
    assert all(any(k.startswith(part) for k in changed) for part in ("audio.", "image.", "audio_head.", "image_head."))
    saved = load_file(checkpoints(run.path)[-1] / "model.safetensors")
    assert all(is_adapter(k) or "_head." in k for k in saved) and len(saved) < len(before) / 2
    sound, picture = torch.randn(2, 16_000), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        for kind, x in (("audio", sound), ("image", picture)):
            tower = getattr(model, kind)
            a, b = (y[0] if isinstance(y, tuple) else y for y in (tower(x), merge(tower).eval()(x)))
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
            assert not torch.equal(a, b) or not any(is_adapter(n) for n, _ in tower.named_parameters())


def test_a_tower_is_still_until_its_step(place, tmp_path):  # noqa: F811
    r = made(place, **{"train.unfreeze_audio_step": 3, "train.unfreeze_image_step": 6, "train.keep": 100})
    run = fit(r, tmp_path / "run")
    start = Trainer(r, tmp_path / "unused").model.state_dict()
    moved = lambda step, part: any(not torch.equal(v, start[k]) for k, v in load_run(checkpoints(run.path)[step // 2 - 1]).state_dict().items() if k.startswith(part))
    assert [(moved(s, "audio."), moved(s, "image."), moved(s, "audio_head.")) for s in (2, 4, 6, 8)] == [(False, False, True), (True, False, True), (True, False, True), (True, True, True)]


def test_cached_tokens_give_the_same_losses(place, tmp_path):  # noqa: F811
    still = {**MODES["token cache"], **LATE, "train.precision": "no"}
    losses = []
    for cache in (True, False):
        run = fit(made(place, **{**still, "train.token_cache": cache}), tmp_path / str(cache))
        losses.append([m["loss"] for m in run.metrics])
    assert len(list((tmp_path / "data/tokens").iterdir())) == 2
    assert np.abs(np.subtract(*losses)).max() <= 1e-5
    assert len(set(losses[0])) == STEPS


def test_a_view_that_moves_is_refused_by_the_token_cache(place, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="view.image.flip"): fit(made(place, **{"train.token_cache": True}), tmp_path / "run")


def test_accumulated_batches_are_named_and_counted(place, tmp_path, capsys):  # noqa: F811
    r = made(place, **{"train.accumulate": 3, "train.steps": None, "train.epochs": 2})
    run = fit(r, tmp_path / "run")
    said = capsys.readouterr().out
    batches = int(said.split(" batches an epoch")[0].rsplit(" ", 1)[1])
    assert run.step == -(-2 * batches // 3) and "with the negatives of one" in said
    assert run.metrics[-1]["lr"] == pytest.approx(r.train.lr / r.train.end_div)  # the cycle ends with the run


def test_milestones_are_kept(place, tmp_path):  # noqa: F811
    run = fit(made(place, **{"train.keep": 1, "train.keep_every": 4}), tmp_path / "run")
    assert {int(p.name[5:]) for p in checkpoints(run.path)} >= {4, 8} and not {2, 6} & {int(p.name[5:]) for p in checkpoints(run.path)}
    assert json.loads((run.path / "recipe.json").read_text())["train"]["keep_every"] == 4
