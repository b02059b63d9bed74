"""The gate: what is committed is what the notebooks say, small, clean, and tied to no machine. Run by `make gate`."""
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1_000_000        # bytes of a notebook, below
CELL, LONG_CELL = 40, 20 # lines of a cell of a library notebook: at most, and worth a second look
MODULE = 300            # lines of an exported module, nbdev's own lines not counted
# {module: why it may be longer}; empty is how it should be
LONG_MODULES: dict[str, str] = {}
# {file: (pattern, why it may name such a path)}; empty is how it should be
PATHS_ALLOWED: dict[str, tuple[str, str]] = {}
RUNS = re.compile(r"^(train|infer|probe|dub|bench)$")

# written so that this file does not match itself
MACHINE_PATH = re.compile(r"(?<![\w.~\-/$})])/(?:home|root|work|tmp|Users)/[\w.]|(?<![A-Za-z])[A-Z]:\\{1,2}\w")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{4,}")
PROGRESS = re.compile(r"\d(?:it/s|s/it)\b|\?it/s")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")
TEXT = {".py", ".ipynb", ".md", ".toml", ".ini", ".txt", ".cff", ".yaml", ".yml", ".json", ".js", ".css", ".cfg", ""}


def listed(root: Path = ROOT) -> list[Path]:
    "Files of the project, relative: what git tracks or would add; without git, all but what tools leave."
    if (root / ".git").exists() and shutil.which("git"):
        out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True)
        if out.returncode == 0: return sorted(Path(p) for p in out.stdout.decode().split("\0") if p and (root / p).is_file())
    left = {".venv", "__pycache__", "build", "dist", ".git", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", "wandb", "_site", "_docs"}
    out = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in left and not n.endswith(".egg-info")]
        out += [(Path(folder) / f).relative_to(root) for f in files]
    return sorted(p for p in out if p.parts[0] != "data" or p == Path("data/README.md"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def texts(cell: dict):
    "Every text a cell put out; pictures and films are not text."
    for out in cell.get("outputs", []):
        if "text" in out: yield "".join(out["text"])
        for kind, value in out.get("data", {}).items():
            if not kind.startswith(("image/png", "image/jpeg", "video/", "audio/")):
                value = value if isinstance(value, (str, list)) else json.dumps(value)
                yield re.sub(r"base64,[A-Za-z0-9+/=\s\\]+", "base64,", "".join(value))
        for line in out.get("traceback", []): yield line


def machine_paths(text: str, file: str):
    "Paths of one machine in a text, less those allowed."
    allowed = PATHS_ALLOWED.get(file)
    for number, line in enumerate(text.splitlines(), 1):
        found = MACHINE_PATH.search(line)
        if found and not (allowed and re.search(allowed[0], line)): yield number, line[max(0, found.start() - 20):found.end() + 40].strip()


def check_notebook(path: Path, size: int) -> tuple[list[str], list[str]]:
    "What is wrong with a notebook, and what is only worth knowing."
    wrong, note = [], []
    nb = json.loads((ROOT / path).read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    markdown = [source(c) for c in nb["cells"] if c["cell_type"] == "markdown"]
    library = any(source(c).startswith("#| default_exp") for c in code)
    if size >= SIZE: wrong.append(f"{size/1e6:.2f} MB; needed below 1 MB: smaller figures, fewer of them")
    lines = markdown[0].splitlines() if markdown else []
    if not (lines and lines[0].startswith("# ") and any(x.startswith("> ") for x in lines)):
        wrong.append("the first markdown cell needs a `# Title` and a line `> question?`")
    if "widgets" in nb["metadata"]: wrong.append("widget state in the metadata; turn off Save Widget State Automatically, clear the progress bars")
    for i, cell in enumerate(nb["cells"]):
        at = f"cell {i}"
        for text in texts(cell):
            for _, shown in machine_paths(text, str(path)): wrong.append(f"{at}: a path of one machine in its output: {shown}")
            if found := ADDRESS.search(text): wrong.append(f"{at}: an object address in its output: {found.group()}")
            if found := PROGRESS.search(text): wrong.append(f"{at}: a progress bar in its output: {text.strip()[:60]!r}")
        for number, shown in machine_paths(source(cell), str(path)): wrong.append(f"{at}, line {number}: a path of one machine: {shown}")
        if cell["cell_type"] == "code" and library:
            n = len(source(cell).strip().splitlines())
            if n > CELL: wrong.append(f"{at}: {n} lines; at most {CELL}")
            elif n > LONG_CELL: note.append(f"{at}: {n} lines")
    if RUNS.match(path.stem):
        tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
        if len(tagged) != 1: wrong.append(f"{len(tagged)} cells tagged `parameters`; a run needs exactly one")
    return wrong, note


def module_lines(text: str) -> int:
    "Lines of a module that a person wrote: its cells, without nbdev's separators."
    cells = re.split(r"^# %% .*$", text, flags=re.M)[1:] if "# %%" in text else [text]
    return sum(len(c.strip().splitlines()) for c in cells if not re.match(r"\s*__all__ = ", c))


def check_modules(files: list[Path]) -> list[str]:
    wrong = []
    for path in files:
        if path.parts[0] != "avnb" or path.suffix != ".py" or path.name == "_modidx.py": continue
        n = module_lines((ROOT / path).read_text())
        if n > MODULE and path.name not in LONG_MODULES: wrong.append(f"{path}: {n} lines; at most {MODULE}: a section becomes a notebook")
        if n <= MODULE and path.name in LONG_MODULES: wrong.append(f"{path}: {n} lines, so it no longer needs its place in LONG_MODULES")
    return wrong


def check_texts(files: list[Path]) -> list[str]:
    wrong = []
    for path in files:
        if path.suffix not in TEXT or path.suffix == ".ipynb" or path.name == "LICENSE": continue
        try: text = (ROOT / path).read_text()
        except UnicodeDecodeError: continue
        wrong += [f"{path}:{number}: a path of one machine: {shown}" for number, shown in machine_paths(text, str(path))]
        if path.suffix == ".md":
            for link in ((a or b).partition("#")[0] for a, b in LINK.findall(text)):
                if link and "://" not in link and not (ROOT / path.parent / link).exists(): wrong.append(f"{path}: link {link} is not there")
    return wrong


def check_contents(notebooks: list[Path]) -> list[str]:
    "The front page names every notebook, with its question word for word."
    front = Path("nbs/index.ipynb")
    if front not in notebooks: return []
    text, wrong = "\n".join(source(c) for c in json.loads((ROOT / front).read_text())["cells"]), []
    for path in notebooks:
        lines = [line for c in json.loads((ROOT / path).read_text())["cells"] if c["cell_type"] == "markdown" for line in source(c).splitlines()]
        question = next((line[2:] for line in lines if line.startswith("> ")), "")
        if path != front and f"[{path.stem}]({path.name}) | {question} |" not in text: wrong.append(f"{front}: no row `[{path.stem}]({path.name}) | {question} |` in the table of contents")
    links = [(a or b).partition("#")[0] for a, b in LINK.findall(text)]
    return wrong + [f"{front}: link {x} is not there, seen from nbs/" for x in links if x and "://" not in x and not (ROOT / front.parent / x).exists()]


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def check_fixed_point(files: list[Path]) -> list[str]:
    "Clean and export a copy; every file must come out as it is here."
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch) / "avnb"
        for path in files:
            if path.parent == Path("avnb") and path.suffix == ".py" and path.name != "__init__.py": continue  # must come out of a notebook
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, top / path)
        steps = [[tool("nbdev-clean")], [tool("nbdev-export")]]
        if Path("README.md") in files and shutil.which("make"):  # the Makefile's own recipe, with this environment
            steps.append(["make", "--silent", "-o", ".venv/made", "readme", f"BIN={Path(sys.executable).parent}"])
        for command in steps:
            done = subprocess.run(command, cwd=top, capture_output=True, text=True)
            if done.returncode: return [f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}"]
        wrong = []
        for path in files:
            if not (top / path).is_file(): wrong.append(f"{path}: no notebook exports it; remove it")
            elif not filecmp.cmp(ROOT / path, top / path, shallow=False): wrong.append(f"{path}: clean, export and `make readme` change it; run them")
        new = {p.relative_to(top) for p in top.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - set(files)
        return wrong + [f"{p}: exported by a notebook and not here; run nbdev-export" for p in sorted(new) if p.parts[0] in ("avnb", "nbs")]


def main() -> int:
    files = listed()
    wrong, notes = check_fixed_point(files) + check_modules(files) + check_texts(files), []
    notebooks = [p for p in files if p.suffix == ".ipynb"]
    wrong += check_contents(notebooks)
    for path in notebooks:
        bad, note = check_notebook(path, (ROOT / path).stat().st_size)
        wrong += [f"{path}: {x}" for x in bad]
        notes += [f"{path.name} {x}" for x in note]
    if notes: print(f"gate: {len(notes)} cells of {LONG_CELL + 1} to {CELL} lines (not an error): " + "; ".join(notes) if "-v" in sys.argv else f"gate: {len(notes)} cells of {LONG_CELL + 1} to {CELL} lines (not an error; -v names them)")
    for line in wrong: print("gate:", line)
    print(f"gate: {len(files)} files, {len(notebooks)} notebooks, " + (f"{len(wrong)} things to mend" if wrong else "clean and export change nothing, nothing to mend"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
