# make quickstart: environment, then a defect classifier on real photographs, then its results.
# make test:       environment, then all tests.
# The first Python on the PATH that is new enough.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make anomaly DATA=FOLDER: generated defects, and what they are worth, on a folder in MVTec AD's layout; goes on where it
# was stopped. The runs are called after the folder and its place: another one has its own. FITS and PREDICTS take further
# options, such as FITS="--trainer.devices 4" PREDICTS="--model.generation.count 500"; for other ones than before name
# another RUN, as a training that has ended is left alone.
RUN ?= $(shell cd "$(DATA)" >/dev/null 2>&1 && printf '%s-%s' "$$(basename "$$PWD" | tr -c '[:alnum:]\n' _)" \
	"$$(printf %s "$$PWD" | cksum | cut -d' ' -f1)")
CHAIN = --data.root "$(DATA)" --run_id $(RUN) --resume $(FITS)
STEPS := experiments/anomaly_diffusion
FIT := $(BIN)/python -m lit_defect fit

.PHONY: quickstart test slow lint anomaly environment

quickstart: environment
	$(BIN)/python -m lit_defect fit --config experiments/quickstart.yaml
	@echo
	@echo "Look at test_mistakes.png and test_confusion.png in the figures above. Then try:"
	@echo "  train the whole network   $(BIN)/python -m lit_defect fit --config experiments/classification/elpv_lite0_finetune.yaml"
	@echo "  your own pictures         $(BIN)/python -m lit_defect fit --config experiments/classification/crops_lite0.yaml \\"
	@echo "                                --data.root FOLDER   (FOLDER/good/*.png, FOLDER/scratched/*.jpg, ...)"
	@echo "  every option              $(BIN)/python -m lit_defect fit --config experiments/quickstart.yaml --print_config"

# On up to four cores; more processes would want more memory than most machines have (about 2.5 GB each).
test: environment
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

slow: environment
	$(BIN)/python -m pytest -m slow

lint: environment
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

anomaly: environment
	@test -d "$(DATA)" || { echo "name a folder in MVTec AD's layout: make anomaly DATA=/path/to/tiles" >&2; exit 1; }
	$(FIT) --config $(STEPS)/autoencoder_magnetic_tile.yaml $(CHAIN)
	$(FIT) --config $(STEPS)/base_magnetic_tile.yaml --model.autoencoder runs/autoencoder_magnetic_tile/$(RUN) $(CHAIN)
	$(FIT) --config $(STEPS)/anomaly_magnetic_tile.yaml --model.base runs/base_magnetic_tile/$(RUN) $(CHAIN)
	$(BIN)/python -m lit_defect predict --config runs/anomaly_magnetic_tile/$(RUN)/config.yaml --run_id $(RUN) --ckpt_path last $(PREDICTS)
	$(FIT) --config $(STEPS)/localizer_magnetic_tile.yaml $(CHAIN)
	$(FIT) --config $(STEPS)/localizer_magnetic_tile.yaml --experiment localizer_generated \
		--data.synthetic.path runs/anomaly_magnetic_tile/$(RUN)/generated --data.synthetic.share 0.25 $(CHAIN)
	$(BIN)/python -m lit_defect.reporting.localization real=runs/localizer_magnetic_tile/$(RUN) \
		generated=runs/localizer_generated/$(RUN)

environment: $(READY)

# Made again only when the dependencies change.
$(READY): pyproject.toml
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it by make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "making the environment in $(VENV); PyTorch is large, so this takes some minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[elpv,test,lint]'
	touch $@
