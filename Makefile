# `make demo` and `make test` start from nothing but a Python 3.11 or later; a second run sets nothing up again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check format demo-train clean

demo: $(READY)
	@$(BIN)/dspark demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# The demo's target, the text it writes and the drafter for it, from nothing: hours on two cores. Goes on where it was.
# `make demo-train SMOKE=1` does the same with next to nothing of everything, in about a minute.
RUNS        := runs/$(if $(SMOKE),smoke,demo)
RECIPES     := recipes/$(if $(SMOKE),smoke,demo)
TARGET_RUN  := $(RUNS)_target
DRAFTER_RUN := $(RUNS)_drafter
SELFPLAY     = $(BIN)/python -m dspark.demo.selfplay --target $(TARGET_RUN)/export
TRAIN_TEXT  := $(if $(SMOKE),--tokens 2000 --rows 8 --new-tokens 48)
HELD_TEXT   := $(if $(SMOKE),--tokens 500 --rows 8 --new-tokens 48,--tokens 50000) --seed 2
demo-train: $(READY)
	$(BIN)/python -m dspark.demo.pretrain $(RECIPES)_target.yaml --out $(TARGET_RUN)
	test -d $(DRAFTER_RUN)/data/train || \
	$(SELFPLAY) --corpus $(TARGET_RUN)/train.npy --out $(DRAFTER_RUN)/data/train $(TRAIN_TEXT)
	test -d $(DRAFTER_RUN)/data/held_out || \
	$(SELFPLAY) --corpus $(TARGET_RUN)/held_out.npy --out $(DRAFTER_RUN)/data/held_out $(HELD_TEXT)
	$(BIN)/dspark train $(RECIPES)_drafter.yaml --out $(DRAFTER_RUN)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d found, 3.11 or later needed; pass PYTHON=/path/to/python3" % sys.version_info[:2])'
	@echo "Setting up $(VENV) (once; torch is the large part) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
