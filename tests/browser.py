"""A real JupyterLab on loopback, driven in a real Chromium: what tests/test_browsers.py stands on, and the command that takes the pictures.

`python tests/browser.py` writes figures/browse_attention.png, figures/browse_probes.png and figures/hero.png.
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MISSING = "chromium or playwright is missing, so no browser was opened: apt-get install chromium, and pip install playwright"


def chromium():
    "Debian's Chromium, or whatever the system calls it; None where there is none."
    found = next((x for x in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if x), None)
    try: import playwright  # noqa: F401
    except ImportError: return None
    return found


class Lab:
    "JupyterLab over a copy of some notebooks, with no setting of this machine, until the `with` ends."
    def __init__(self, *notebooks, theme="JupyterLab Light"):
        self.top = Path(tempfile.mkdtemp(prefix="avnb_lab_"))
        self.work = self.top / "nbs"
        self.work.mkdir()
        (self.top / "figures").mkdir()
        for f in (ROOT / "figures").glob("browse_*.png"): shutil.copy2(f, self.top / "figures" / f.name)
        for n in notebooks: shutil.copy2(ROOT / "nbs" / n, self.work / n)
        (self.top / "settings.ini").write_text("[paths]\ndata = data\nfigures = figures\n")
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.token = secrets.token_hex(16)
        own = {k: str(self.top / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        quiet = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        (quiet.parent / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
        self.runtime = Path(own["JUPYTER_RUNTIME_DIR"])
        env = os.environ | own | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = open(self.top / "lab.log", "w")
        self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", "--allow-root",
            f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.top}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly", "--ServerApp.terminals_enabled=False"], env=env, stdout=self.log, stderr=self.log, cwd=self.top)

    def __enter__(self):
        until = time.time() + 60
        while time.time() < until:
            if self.process.poll() is not None: break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/status?token={self.token}", timeout=2).read()
                return self
            except OSError: time.sleep(.2)
        self.__exit__()
        raise RuntimeError(f"JupyterLab did not start:\n{(self.top / 'lab.log').read_text()[-1500:]}")

    def __exit__(self, *_):
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()
        shutil.rmtree(self.top, ignore_errors=True)

    def url(self, notebook):
        "A workspace to each notebook: in one and the same, the second page would open the first notebook again, in front of its own or behind it."
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{Path(notebook).stem}/tree/nbs/{notebook}?token={self.token}"

    def sessions(self): return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/sessions?token={self.token}"))

    def kernel(self, notebook):
        "A client of the kernel that a notebook runs in."
        from jupyter_client import BlockingKernelClient
        number = next(s["kernel"]["id"] for s in self.sessions() if s["path"].endswith(notebook))
        client = BlockingKernelClient(connection_file=str(self.runtime / f"kernel-{number}.json"))
        client.load_connection_file(); client.start_channels(); client.wait_for_ready(20)
        return client


class Notebook:
    "One notebook in one page: what a person sees and does, and everything that goes wrong meanwhile."
    def __init__(self, lab, browser, name, size=(1280, 1800), scale=1):
        self.lab, self.name = lab, name
        self.errors, self.away, self.sent = [], [], []
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, device_scale_factor=scale)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1:", "blob:", "data:")) else self.away.append(r.url))
        self.page.on("websocket", lambda w: (w.on("framesent", lambda f: self.sent.append(f)), None if w.url.startswith("ws://127.0.0.1:") else self.away.append(w.url)))
        self.page.goto(lab.url(name))
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
        until = time.time() + 60
        while not any(s["path"].endswith(name) and s["kernel"]["execution_state"] == "idle" for s in lab.sessions()):
            if time.time() > until: raise RuntimeError(f"{name}: no idle kernel after a minute: {lab.sessions()}")
            time.sleep(.1)
        self.client = None

    def run_all(self, selector):
        "Run > Run All Cells, until a widget's own selector is there; seconds it took."
        begun = time.time()
        self.page.click('.lm-MenuBar-item:has-text("Run")')
        self.page.click('[data-command="runmenu:run-all"]')
        self.page.wait_for_function("""() => document.querySelector('.jp-Dialog .jp-mod-accept') || [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(p => /[*0-9]/.test(p.textContent))""", timeout=30_000)
        if self.page.locator(".jp-Dialog .jp-mod-accept").count(): self.page.click(".jp-Dialog .jp-mod-accept")  # "Select Kernel", where the session isn't known to the page yet
        self.page.wait_for_selector(selector, timeout=60_000)
        took = time.time() - begun
        self.page.wait_for_function("""() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(p => !p.textContent.includes('*'))
            && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')""", timeout=60_000)
        return took

    def failed(self): return self.page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"], .jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()

    def python(self, code):
        "Execute in the notebook's kernel; what it printed."
        self.client = self.client or self.lab.kernel(self.name)
        out = []
        reply = self.client.execute_interactive(code, timeout=30, output_hook=lambda m: out.append(m["content"].get("text", "")) if m["msg_type"] == "stream" else None)
        if reply["content"]["status"] != "ok": raise RuntimeError("\n".join(reply["content"]["traceback"]))
        return "".join(out).strip()

    def wait_python(self, expression, seconds=8):
        "Until an expression is true in the kernel: messages take their time."
        until = time.time() + seconds
        while time.time() < until:
            if self.python(f"print(bool({expression}))") == "True": return True
            time.sleep(.1)
        return False

    def close(self):
        if self.client: self.client.stop_channels()
        self.context.close()


def opened(play):
    return play.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage", "--mute-audio", "--disable-background-networking", "--disable-component-update", "--no-first-run"])


def dress(notebook, code, selector, file, pad=0):
    "Put a browser into a state worth a picture, and take it."
    notebook.python(code)
    notebook.page.wait_for_timeout(900)
    there = notebook.page.locator(selector).first
    there.scroll_into_view_if_needed()
    there.screenshot(path=str(file))
    return file


def pictures(out=ROOT / "figures"):
    "The static pictures of both browsers, and the front page's."
    from playwright.sync_api import sync_playwright
    attention = "b.playing = False; b.language, b.head, b.opacity = 'en', 'all', .85; b.region, b.span, b.time_s = (10/14, 10/14, 11/14, 11/14), None, 2.46"
    scene = "p.run, p.protocol, p.split, p.colour_by = 'B5', 'sound class', 'test', 'label'; r = p.gallery.rows; p.chosen = next(i for i in range(len(p.gallery)) if r['id'][i] == 'dubs_test_0003#1' and r['language'][i] == 'ja')"
    for name, selector, code in (("browse_attention.ipynb", ".avnb-attention", attention), ("browse_probes.ipynb", ".avnb-probes", scene)):
        with Lab(name) as lab, sync_playwright() as play:
            browser = opened(play)
            n = Notebook(lab, browser, name, size=(1440, 1500), scale=1.5)
            n.run_all(f"{selector}[data-drawn]")
            print(dress(n, code, selector, out / f"{Path(name).stem}.png"))
            if "attention" in name: print(dress(n, "b.head, b.time_s, b.region = b.clip.heads[0], 4.42, (3/14, 9/14, 4/14, 10/14)", selector, out / "hero.png"))
            n.close(); browser.close()


if __name__ == "__main__":
    if chromium() is None: sys.exit(MISSING)
    pictures()
