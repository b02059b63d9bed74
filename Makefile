# Two commands do everything on a bare Debian or Ubuntu (once: apt install make python3-venv): `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PY  ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# once the environment stands, nothing waits for a network that is not there
export HF_HUB_OFFLINE := 1
export WANDB_SILENT := true
export PIP_PROGRESS_BAR := off
# run notebooks at their defaults are the real thing: pytest runs each by papermill with `-p quick True`
RUNS := ^([_.]|train|infer|probe|dub|bench|study_|browse_)

.DEFAULT_GOAL := help
.PHONY: help env demo test gate quick soak lab readme results docs clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

env: .venv/made ## .venv with avnb, the extra dev, and the versions of constraints.txt

.venv/made: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "avnb needs Python 3.11 or newer; try: make env PY=python3.11")'
	@$(PY) -m venv .venv || { echo "Python lacks its venv module: apt install python3-venv"; exit 1; }
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt setuptools
	PYTHONWARNINGS=ignore $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: ## all set up, and the main job on the embedded corpus: LSSD's B.5 from nothing (B.3 first), its test; then grounding for a minute, and its heat video
	@t0=$$(date +%s); $(MAKE) --no-print-directory env; t1=$$(date +%s); mkdir -p data/runs/B5 data/runs/minute; \
	$(BIN)/papermill --no-log-output nbs/train.ipynb data/runs/B5/train.ipynb -p variant B5; t2=$$(date +%s); \
	$(BIN)/papermill --no-log-output nbs/train.ipynb data/runs/minute/train.ipynb -p variant grounding -p name minute -p steps 240 -y '{overrides: {data.videos: 120, train.val_every: 120}}'; t3=$$(date +%s); \
	$(BIN)/papermill --no-log-output nbs/infer.ipynb data/runs/minute/infer.ipynb -p checkpoint data/runs/minute; t4=$$(date +%s); \
	echo "seconds: environment $$((t1-t0)); B3 and B5 with corpus and test $$((t2-t1)); grounding with corpus and test $$((t3-t2)); heat-map video $$((t4-t3)); in all $$((t4-t0))"; \
	echo "Open data/runs/B5/train.ipynb (make lab), and play data/runs/minute/heat/*.mp4."

gate: env
	@$(BIN)/python tests/gate.py
	$(BIN)/nbdev-test --n-workers 2 --skip-file-re '$(RUNS)'
	$(BIN)/ruff check avnb tests

test: env ## all set up, and everything checked: clean + export change nothing, notebooks run, pytest, ruff (15 minutes at most)
	@$(MAKE) --no-print-directory gate
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak" tests

quick: env ## the quick tests, under 2 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m quick tests

soak: env ## the long forms
	$(BIN)/python -m pytest -m soak tests

lab: env ## JupyterLab on this folder
	$(BIN)/jupyter lab

readme: env ## README.md from nbs/index.ipynb, its links (relative to nbs/) made relative to the top
	$(BIN)/jupyter nbconvert --to markdown --log-level ERROR --output-dir . --output README nbs/index.ipynb
	@sed -i.old -E 's#\]\(([A-Za-z0-9_]+\.ipynb)#](nbs/\1#g; s#(\]\(|src=")\.\./#\1#g' README.md && rm README.md.old

results: env ## figures/results.md from the published results files, index.ipynb run on it, README.md
	$(BIN)/python -m avnb.report --index
	cd nbs && ../$(BIN)/jupyter nbconvert --log-level ERROR --execute --inplace --to notebook index.ipynb && ../$(BIN)/nbdev-clean --fname index.ipynb
	@$(MAKE) --no-print-directory readme

docs: env ## the site in _site/, from the notebooks as they were last run (a minute)
	@mkdir -p _docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "Open _site/index.html"

clean: ## clear what tools left; corpora and runs stay
	rm -rf build dist _docs _site *.egg-info .pytest_cache .ruff_cache .hypothesis; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
