"""What leaves the house: read back by transformers alone, without a network and without avnb where that is promised."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avnb.adapters import is_adapter, trainable
from avnb.checkpoints import build_model, load_run, save_checkpoint
from avnb.core import read_json, seed_everything, write_json
from avnb.encoders import build_encoder, normalise
from avnb.losses import LogScale
from avnb.recipes import recipe, to_dict

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
SPECS = {"hubert": {"kind": "hubert", "config": dict(**SMALL, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)},
         "dinov2": {"kind": "dinov2", "config": dict(**SMALL, mlp_ratio=2, image_size=56, patch_size=14)},
         "vit": {"kind": "vit", "config": dict(**SMALL, intermediate_size=64, image_size=112, patch_size=14)}}
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.quick

READ = """
import torch
from transformers import AutoModel
def read(place):
    for kind, key in (("ear", "input_values"), ("eye", "pixel_values")):
        x, tower = torch.load(f"{place}/x.pt")[kind], AutoModel.from_pretrained(f"{place}/{kind}").eval()
        with torch.no_grad(): torch.save(tower(**{key: x}).last_hidden_state, f"{place}/{kind}.pt")
"""
ALONE = """
import sys
read(sys.argv[1])
assert not [m for m in sys.modules if m.startswith("avnb")]
"""


def python(*args):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=OFFLINE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_run(place: Path, audio: str, image: str, **overrides) -> Path:
    "A run folder of two steps that were never taken."
    for name in {audio, image} & set(SPECS): build_encoder(SPECS[name]).model.save_pretrained(place / name)
    where = lambda name: str(place / name) if name in SPECS else name
    made = recipe("grounding", overrides={"model.audio": where(audio), "model.image": where(image), "model.head": "linear", "data.source": str(place / "my clips"), "train.steps": 2, **overrides})
    seed_everything(1)
    model = build_model(made)
    with torch.no_grad(): [p.add_(torch.randn(p.shape) * .1) for t in (model.audio, model.image) if t.lora for p in trainable(t)]
    for m in model.modules():
        if hasattr(m, "running_mean") and m.running_mean is not None: m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    write_json(place / "run" / "recipe.json", to_dict(made))
    save_checkpoint(place / "run", 2, model, LogScale(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), dict(cpu_s=1., skipped=[0, 0]))
    return place / "run"


def gap(x, y): return ((x - y).abs().max() / y.abs().max()).item()


@pytest.mark.parametrize("image,rank,alone", [("dinov2", 0, False), ("vit", 4, False), ("dinov2", 4, True)])
def test_towers_without_avnb(tmp_path, image, rank, alone):
    "HuBERT, DINOv2 and ViT, adapters or none: transformers alone, once also in a process that never saw avnb, gives the same outputs."
    from avnb.publishing import export_tower
    run = make_run(tmp_path, "hubert", image, **{"model.lora_audio": rank, "model.lora_image": rank})
    model, sound, picture = load_run(run), torch.randn(2, 8000), torch.randn(2, 3, 112, 112)
    for kind, name in (("audio", "ear"), ("image", "eye")): export_tower(run, kind, tmp_path / name)
    torch.save(dict(ear=normalise(sound), eye=picture), tmp_path / "x.pt")
    if alone: python("-c", READ + ALONE, str(tmp_path))
    else:
        exec(READ, found := {})
        found["read"](tmp_path)
    with torch.no_grad():
        assert gap(torch.load(tmp_path / "ear.pt"), model.audio(sound)[0]) < 1e-6
        assert gap(torch.load(tmp_path / "eye.pt")[:, 1:], model.image(picture)) < 1e-6


def test_toy_towers(tmp_path):
    "Toy towers keep running statistics and the tables that are in no file; padding is masked as in the tower."
    from transformers import AutoModel

    from avnb.publishing import export_tower
    run = make_run(tmp_path, "toy", "toy")
    model, sound, picture = load_run(run), torch.randn(2, 8000), torch.randn(2, 3, 112, 112)
    ear = AutoModel.from_pretrained(export_tower(run, "audio", tmp_path / "ear")).eval()
    eye = AutoModel.from_pretrained(export_tower(run, "image", tmp_path / "eye")).eval()
    keep = torch.arange(8000)[None] < torch.tensor([[8000], [5000]])
    with torch.no_grad():
        assert ear(sound, attention_mask=keep).last_hidden_state.equal(model.audio(sound, keep)[0])
        assert eye(pixel_values=picture).last_hidden_state.equal(model.image(picture))


def test_a_published_folder_stands_alone(tmp_path):
    "Written by the command; the base and the run are gone, and it loads; nothing in it knows this machine; the tower of a published folder exports as the run's does."
    from avnb.publishing import export_tower
    run = make_run(tmp_path, "hubert", "dinov2", **{"model.lora_audio": 2, "model.lora_image": 2})
    held = [k for f in run.glob("checkpoints/*/model.safetensors") for k in load_file(f)]
    assert all(is_adapter(k) or not k.startswith(("audio.", "image.")) for k in held), "a checkpoint holds adapters alone"
    model, sound, picture = load_run(run), torch.randn(2, 8000), torch.randn(2, 3, 112, 112)
    python("-m", "avnb.publishing", str(run), str(tmp_path / "out"))
    for name in ("run", "hubert", "dinov2"): shutil.rmtree(tmp_path / name)
    shown = load_run(tmp_path / "out")
    with torch.no_grad():
        assert gap(shown.embed_audio(sound)[0], model.embed_audio(sound)[0]) < 1e-5
        assert gap(shown.embed_image(picture), model.embed_image(picture)) < 1e-5
    export_tower(tmp_path / "out", "audio", tmp_path / "ear")
    for file in [f for name in ("out", "ear") for f in (tmp_path / name).rglob("*") if f.is_file()]:
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() + b"/" not in content, file
    assert read_json(tmp_path / "out" / "recipe.json")["data"]["source"] == "my clips"


def test_the_hub_reads_the_card(tmp_path):
    "huggingface_hub's own reader finds licence, library, figures and names in the head of the card."
    from huggingface_hub import ModelCard

    from avnb.publishing import publish_folder
    run = make_run(tmp_path, "toy", "toy")
    write_json(run / "results.json", dict(run="run", checkpoint=2, which="best", protocol="p", metrics={"a2v/R@1": dict(value=.5, lo=.4, hi=.6, n=9)}, baselines={}, versions={}, command="x"))
    card = ModelCard.load(publish_folder(run, tmp_path / "out") / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("unknown", "avnb", "run")  # clips of one's own
    assert [(e.metric_type, e.metric_value) for e in card.data.eval_results] == [("a2v/R@1", .5)]


@pytest.mark.parametrize("audio,source,said", [("toy", None, "apache-2.0"), ("toy", "clips", "unknown"), ("hubert", None, "unknown"), ("hubert", "clips", "cc-by-nc-4.0")])
def test_no_licence_is_claimed_for_what_is_not_ours(tmp_path, audio, source, said):
    "Only fresh towers on the generated corpus get a licence by themselves; base and data keep theirs, in the card of the model and of a tower."
    from huggingface_hub import ModelCard

    from avnb.publishing import export_tower, main
    run = make_run(tmp_path, audio, "toy", **{"data.source": source})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["avnb.publishing", str(run), str(tmp_path / "out"), *(["--licence", said] if said.startswith("cc") else [])])
        main()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == said and ("keep their own licences" in card.text) == (said != "apache-2.0")
    export_tower(run, "audio", tmp_path / "ear", licence=said if said.startswith("cc") else None)
    assert ModelCard.load(tmp_path / "ear" / "README.md").data.license == said


def test_a_store_is_a_dataset(tmp_path):
    "The card of a store makes `load_dataset` read the folder."
    from datasets import load_dataset

    from avnb.publishing import data_card
    from avnb.rows import StoreConfig
    from avnb.store import open_store, prepare
    from avnb.toy import make_toy
    prepare(make_toy(tmp_path / "raw", 1, languages=("en",)), tmp_path / "store", recipe=StoreConfig(workers=0))
    data_card(tmp_path / "store", licence="apache-2.0")
    read, store = load_dataset(str(tmp_path / "store"), split="train", cache_dir=str(tmp_path / "cache")), open_store(tmp_path / "store")
    assert read["content"][:] == store["content"][:] and read[0]["sound"] == store[0]["sound"]
