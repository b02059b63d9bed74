"""A working directory of one's own, as a person would have it."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def workplace(folder: Path, more: str = "") -> Path:
    "A working directory with a settings.ini of its own: nothing goes into the data of the repository but what the toy's voices say, which takes 10 seconds to make and is the same for all."
    voices = ROOT / "data/voices"
    voices.mkdir(exist_ok=True)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if not (folder / "data/voices").is_symlink(): (folder / "data/voices").symlink_to(voices)
    (folder / "settings.ini").write_text(f"[paths]\ndata = data\nfigures = figures\nruns = data/runs\n[run]\ndevice = cpu\n{more}")
    return folder
