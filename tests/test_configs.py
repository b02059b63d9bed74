"""The config file of the published code: every key does here what it did there, or is refused by name."""
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given, settings as effort, strategies as st
from places import workplace

import avnb.configs
from avnb.checkpoints import checkpoints
from avnb.configs import OURS, SECTIONS, from_sections, job_from_file, read_config, unknown_key
from avnb.core import read_json
from avnb.media import write_video
from avnb.recipes import differences, from_dict, recipe
from avnb.training import fit, read_lines

# as the seed document has it, word for word
SEED = """\
training:
  video_dir: '/path/to/video/segments'        # Directory containing preprocessed 1s video segments
  output_dir: './outputs'                     # Directory to save checkpoints and visualizations
  batch_size: 48                              # Training batch size
  num_epochs: 100                             # Number of training epochs
  learning_rate: 8e-4                         # Peak learning rate for OneCycleLR
  num_workers: 12                             # Number of dataloader workers
  gradient_accumulation_steps: 1              # Number of steps to accumulate gradients
  save_every_steps: 4000                      # Save checkpoint every N steps
  device: 'cuda'                              # Training device ('cuda' or 'cpu')
  force_new_training: false                   # Force new training or resume from checkpoint

model:
  unfreeze_hubert_epoch: 2                    # Epoch to unfreeze HuBERT parameters
  unfreeze_vit_epoch: 5                       # Epoch to unfreeze ViT parameters

visualization:
  vis_every: 5000                             # Create visualizations every N steps
  num_vis_samples: 20                         # Number of samples to visualize

wandb:
  enabled: true                               # Enable Weights & Biases logging
  project: "Project_Name"                     # W&B project name
  run_name: "Run_Name"                        # W&B run name
"""
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]
NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    "A folder of {video}_{segment}.mp4: six videos of two seconds."
    folder, g = tmp_path_factory.mktemp("videos") / "segments", torch.Generator().manual_seed(0)
    folder.mkdir()
    for video in range(1, 7):
        colour = torch.randint(60, 255, (3, 1, 1), generator=g)
        for part in range(2):
            frames = torch.full((25, 3, 64, 80), 30, dtype=torch.uint8)
            for i in range(25): frames[i, :, 8 + i:24 + i, 8 + part:24] = colour
            write_video(folder / f"{video}_{part}.mp4", frames, 25, {"und": 0.3 * torch.sin(torch.arange(48_000) * 0.01 * video)})
    return folder


@pytest.fixture
def place(tmp_path, segments, monkeypatch):
    "A working directory with a settings.ini of its own and the segments."
    monkeypatch.chdir(workplace(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    shutil.copytree(segments, tmp_path / "segments")
    return tmp_path


def written(place: Path, **changes) -> Path:
    "The seed's file with its paths, epochs and batch replaced, nothing else."
    text = SEED.replace("/path/to/video/segments", str(place / "segments"))
    for key, value in changes.items(): text = re.sub(rf"(?<=  {key}: )\S+", str(value), text)
    (place / "config.yaml").write_text(text)
    return place / "config.yaml"


def test_the_seeds_file_means_what_it_says(place):
    job = job_from_file(written(place))
    t = job.recipe.train
    assert (t.batch_size, t.steps, t.epochs, t.lr, t.accumulate, t.save_every) == (48, None, 100, 8e-4, 1, 4000)
    assert (t.unfreeze_audio, t.unfreeze_image, t.draw_every, t.draw_n) == (2, 5, 5000, 20)
    assert job.recipe.data.source == str(place / "segments") and job.out == Path("outputs") and not job.force_new
    assert job.recipe.variant == "grounding" and job.recipe.scale == "toy" and any("scale: toy" in n for n in job.notes)
    assert job.wandb == {"mode": "online", "project": "Project_Name", "name": "Run_Name"}
    assert 0 < job.workers <= 12
    assert job.workers == 12 or any(n.startswith("training.num_workers: 12 ") for n in job.notes)
    if NO_GPU: assert job.device == "cpu" and sum("cuda" in n for n in job.notes) == 1


def test_both_ways_of_starting_give_one_job(place):
    "The notebook gets the sections as dicts from papermill, the shell gets the file."
    path = written(place)
    assert from_sections(**yaml.safe_load(path.read_text())) == job_from_file(path) == from_sections(**read_config(path))


def test_published_scale_is_the_seeds_recipe(place):
    "At the published scale, the file changes nothing of the variant but how often it draws: the two say the same."
    job = job_from_file(written(place), scale="published")
    changed = differences(recipe("grounding", "published", data=place / "segments"), job.recipe)
    assert set(changed) == {"train.draw_every", "train.draw_n"} and not any("scale" in n for n in job.notes)


def test_the_seeds_file_trains_and_goes_on(place):
    path = written(place, batch_size=3, num_epochs=2)
    job = job_from_file(path, overrides={"store.fps": 2, "store.workers": 0, "train.log_every": 1})
    run = fit(job.recipe, job.out, job.force_new)
    steps = [line["step"] for line in read_lines(run.path / "metrics.jsonl")]
    assert run.path == Path("outputs") and steps == list(range(1, run.step + 1)) and checkpoints(run.path)[-1].name == f"step_{run.step:08d}"
    assert from_dict(read_json("outputs/recipe.json")) == job.recipe
    again = job_from_file(path, overrides={"store.fps": 2, "store.workers": 0, "train.log_every": 1})
    assert fit(again.recipe, again.out, again.force_new).step == run.step
    assert [line["step"] for line in read_lines("outputs/metrics.jsonl")] == steps


# ---- names ----

def slips(word: str) -> set[str]:
    "What fingers make of a word."
    out = {word[:i] + word[i + 1:] for i in range(len(word))}
    out |= {word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(len(word) - 1)}
    out |= {word.replace("_", "-"), word.replace("_", ""), word.upper(), word.title(), word + "s", word + "_"}
    return out - {word} - {k for _, k in KEYS}


@pytest.mark.quick
@pytest.mark.parametrize("section,key", KEYS)
def test_a_misspelt_key_is_refused_naming_the_right_one(section, key):
    for slip in slips(key):
        with pytest.raises(ValueError, match=re.escape(f"{section}.{slip} is not a key")) as said: from_sections(**{section: {slip: 1}})
        assert f"did you mean {section}.{key}?" in str(said.value), slip


@pytest.mark.quick
@pytest.mark.parametrize("section,key", KEYS)
def test_a_key_in_the_wrong_section_is_sent_home(section, key):
    for other in set(SECTIONS) - {section}:
        with pytest.raises(ValueError, match=f"{other}.{key} is not a key of the config; '{key}' belongs to the section '{section}'"): from_sections(**{other: {key: 1}})


@pytest.mark.quick
@effort(max_examples=60, deadline=None)
@given(st.sampled_from(list(SECTIONS)), st.text(string.printable, min_size=0, max_size=12))
def test_no_unknown_key_passes(section, key):
    assume(key not in SECTIONS[section])
    with pytest.raises(ValueError) as said: from_sections(**{section: {key: 1}})
    assert str(said.value) == unknown_key(section, key)


@pytest.mark.quick
@pytest.mark.parametrize("section,key", KEYS)
def test_a_wrong_type_is_named(section, key):
    for value in ([1, 2], {"a": 1}, "a word" if SECTIONS[section][key] is not str else 3):
        with pytest.raises(ValueError, match=re.escape(f"{section}.{key}")): from_sections(**{section: {key: value}})


@pytest.mark.quick
@pytest.mark.parametrize("section,key,value", [("training", "batch_size", 0), ("training", "batch_size", 1.5), ("training", "num_epochs", -1), ("training", "learning_rate", 0), ("training", "learning_rate", "nan"),
    ("training", "num_epochs", float("inf")), ("training", "num_workers", -1), ("training", "gradient_accumulation_steps", 0), ("training", "save_every_steps", 0), ("training", "device", "gpu"), ("training", "video_dir", ""),
    ("visualization", "vis_every", 0), ("visualization", "num_vis_samples", 0), ("training", "batch_size", True)])
def test_a_value_that_cannot_be_is_named(section, key, value):
    with pytest.raises(ValueError, match=re.escape(f"{section}.{key}")): from_sections(**{section: {key: value}})


@pytest.mark.quick
def test_words_at_the_top(tmp_path):
    def refused(text, why):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=why): job_from_file(tmp_path / "c.yaml")
    refused("trainin: {batch_size: 2}", "'training'")
    refused("num_epochs: 2", "belongs to the section 'training'")
    refused("varient: grounding", "'variant'")
    refused("- 1\n- 2", "expected sections")
    refused("training: [1]", "expected a section with keys")
    refused("training:\n\tbatch_size: 2", "is not YAML")
    refused("overrides: 5", "overrides=5")
    refused("force_new: 3", "force_new=3")
    (tmp_path / "c.yaml").write_text("variant: grounding_seed\nseed: 3\nsteps: 7\noverrides: {train.clip: 2}\nmodel:\n")
    job = job_from_file(tmp_path / "c.yaml", seed=4, overrides={"train.warmup": 0.2})
    assert (job.recipe.variant, job.recipe.seed, job.recipe.train.steps, job.recipe.train.clip, job.recipe.train.warmup) == ("grounding_seed", 4, 7, 2., 0.2)
    assert job.wandb is None and job.device is None and job.workers is None and not job.notes
    with pytest.raises(TypeError, match="'steps'"): job_from_file(tmp_path / "c.yaml", step=3)
    with pytest.raises(FileNotFoundError, match="no such config file"): job_from_file(tmp_path / "d.yaml")


# ---- what is said twice, and where to log ----

def test_what_is_typed_for_the_run_stands_above_the_file(place):
    job = job_from_file(written(place), data=place / "segments", out=place / "mine", steps=5, save_every=2, overrides={"train": {"lr": 0.01}}, force_new=True)
    assert (job.recipe.train.steps, job.recipe.train.save_every, job.recipe.train.lr, job.out, job.force_new) == (5, 2, 0.01, place / "mine", True)
    for key in ("training.video_dir", "training.output_dir", "training.num_epochs", "training.save_every_steps"): assert sum(key in n for n in job.notes) == 1


def test_accumulation_is_named_as_what_it_is(place):
    job = job_from_file(written(place, gradient_accumulation_steps=4))
    assert job.recipe.train.accumulate == 4 and any("not a larger batch" in n for n in job.notes)


def test_a_folder_that_is_not_there_is_named(place):
    with pytest.raises(FileNotFoundError, match=r"training.video_dir: /path/to/video/segments is not a folder"): from_sections(**yaml.safe_load(SEED))


def test_where_to_log(place, monkeypatch):
    path = written(place)
    (place / "settings.ini").write_text("[wandb]\nmode = offline\nproject = ours\n")
    assert job_from_file(path).wandb["mode"] == "offline"
    off = from_sections(wandb={"enabled": False, "run_name": "x"})
    assert off.wandb == {"mode": "disabled", "project": "ours", "name": "x"} and from_sections().wandb is None
    assert from_sections(wandb={"project": "p"}).wandb == {"mode": "offline", "project": "p", "name": "grounding"}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    job = job_from_file(path)
    assert job.wandb["mode"] == "disabled" and any("WANDB_MODE=disabled" in n for n in job.notes)


@pytest.mark.quick
def test_more_readers_than_cores_are_cut(monkeypatch):
    monkeypatch.setattr(avnb.configs.os, "cpu_count", lambda: 2)
    job = from_sections(training={"num_workers": 12})
    assert job.workers == 2 and any("this machine has 2 cores" in n for n in job.notes)
    assert from_sections(training={"num_workers": 1}).workers == 1


@pytest.mark.quick
def test_our_words_are_the_notebooks(tmp_path):
    from papermill.inspection import inspect_notebook
    there = set(inspect_notebook(str(Path(__file__).resolve().parent.parent / "nbs/train.ipynb")))
    assert set(OURS) <= there
