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
TARGET_RUN  := runs/demo_target
DRAFTER_RUN := runs/demo_drafter
SELFPLAY     = $(BIN)/python -m dspark.demo.selfplay --target $(TARGET_RUN)/export
demo-train: $(READY)
	$(BIN)/python -m dspark.demo.pretrain recipes/demo_target.yaml --out $(TARGET_RUN)
	test -d $(DRAFTER_RUN)/data/train || $(SELFPLAY) --corpus $(TARGET_RUN)/train.npy --out $(DRAFTER_RUN)/data/train
	test -d $(DRAFTER_RUN)/data/held_out || \
	$(SELFPLAY) --corpus $(TARGET_RUN)/held_out.npy --out $(DRAFTER_RUN)/data/held_out --tokens 50000 --seed 2
	$(BIN)/dspark train recipes/demo_drafter.yaml --out $(DRAFTER_RUN)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d found, 3.11 or later needed; pass PYTHON=/path/to/python3" % sys.version_info[:2])'
	@echo "Setting up $(VENV) (once; torch is the large part) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
