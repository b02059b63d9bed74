"""What holds for the package as a whole: which way imports point, what importing costs, what can be imported."""
import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.quick

# what scripts may rely on, so far
PUBLIC = {
    "core": "settings seed_everything check_parameters",
    "media": "probe decode_frames decode_audio tracks segment mux",
    "toy": "make_toy",
    "real": "fetch_bbb",
    "store": "prepare open_store",
    "batches": "VideoSampler collate",
    "encoders": "audio_encoder image_encoder",
    "similarity": "max_mean",
    "losses": "info_nce",
    "models": "DenseAligner",
    "metrics": "retrieval ciou pointing segmentation",
    "recipes": "recipe variants",
    "checkpoints": "load_run",
    "training": "fit",
    "inference": "extract postprocess heat_map heat_videos main",
    "probes": "linear_probe knn_probe hear_probe",
    "hear": "load_model get_scene_embeddings get_timestamp_embeddings",
    "viz": "show_heat heat_video save_figure",
}


def numbered() -> dict[str, str]:
    "Modules in the order of the paper: {module: notebook}."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if source.startswith("#| default_exp "): found[source.split()[2]] = path.stem
    return found


MODULES = numbered()


def imported(module: str) -> set[str]:
    "Modules of avnb that a module imports, also inside functions."
    names = set()
    for node in ast.walk(ast.parse((ROOT / "avnb" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import): names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("avnb.")}
        if isinstance(node, ast.ImportFrom):
            full = ("avnb." if node.level else "") + (node.module or "")
            if full == "avnb." or full == "avnb": names |= {a.name for a in node.names}
            elif full.startswith("avnb."): names.add(full.split(".")[1])
    return names


def python(code: str, *args: str, **kwargs) -> str:
    "Run code in a fresh interpreter; its standard output."
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_has_its_notebook():
    there = {p.stem for p in (ROOT / "avnb").glob("*.py")} - {"__init__", "_modidx"}
    assert there == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up_the_table(module):
    order = list(MODULES)
    down = {name: MODULES[name] for name in imported(module) if order.index(name) >= order.index(module)}
    assert not down, f"{MODULES[module]} imports from {down}, which stands below it"


@pytest.mark.parametrize("module", sorted(name for name, notebook in MODULES.items() if notebook.startswith(("02_", "03_", "04_"))))
def test_figures_know_core_and_media_alone(module):
    grounds = {name for name, notebook in MODULES.items() if notebook.startswith(("00_", "01_", "02_"))}
    assert imported(module) <= grounds


def test_import_is_light():
    heavy = python("import sys, avnb; print(*[m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'av', 'numpy') if m in sys.modules])")
    assert not heavy.strip(), f"`import avnb` brings {heavy}"


def test_transformers_waits_until_it_is_needed():
    "Only a published tower needs it; the data half and the toy towers don't."
    heavy = python("import sys, avnb.training; print(*[m for m in ('transformers', 'peft', 'wandb', 'ray', 'IPython') if m in sys.modules])")
    assert not heavy.strip(), f"`import avnb.training` brings {heavy}"


OFFLINE = """
import importlib, socket, sys
def refuse(*a, **k): raise RuntimeError("the network was used at import")
class Closed(socket.socket):
    def connect(self, *a): refuse()
    connect_ex = connect
socket.socket, socket.create_connection, socket.getaddrinfo = Closed, refuse, refuse
for name in sys.argv[1:]: importlib.import_module("avnb." + name)
print(len(sys.argv) - 1)
"""


def test_no_network_at_import():
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    assert int(python(OFFLINE, *MODULES, env=environment)) == len(MODULES)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    found = importlib.import_module(f"avnb.{module}")
    missing = [name for name in PUBLIC[module].split() if not hasattr(found, name)]
    assert not missing, f"avnb.{module} lacks {missing}"


def test_ruff():
    ruff = Path(sys.executable).parent / "ruff"
    command = str(ruff) if ruff.exists() else shutil.which("ruff")
    assert command, "ruff is part of the extra dev: make env"
    done = subprocess.run([command, "check", "avnb", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
