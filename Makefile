# `make` lists the targets. Each sets up what it needs in .venv.
PYTHON ?= python3

# Values on the command line are data. make does not expand them, and recipes pass them in the environment: no shell parses them.
given := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(foreach name,$(given) PYTHON,$(eval override $(name) := $$(value $(name))))
set := $(strip $(foreach name,$(given),$(if $($(name)),$(name))))
$(foreach name,$(set),$(eval export $(name)))

VENV := .venv
BIN := $(VENV)/bin
ENDPOINT_VENV := .venv-endpoint
DEPLOY_VENV := .venv-deploy
SOURCES := handler.py handlers remote_vae clients scripts benchmarks tests

# The variables that each target takes; any other, which may be a misspelt one, is an error before anything happens.
TAKES_serve := MODEL PORT HOST WEIGHTS DEVICE DTYPE
TAKES_deploy-all := NAMESPACE VENDOR REGION ACCESS MIN_REPLICA MAX_REPLICA SCALE_TO_ZERO TIMEOUT KEEP DRY_RUN
TAKES_deploy := MODEL NAME INSTANCE SIZE WEIGHTS REVISION $(TAKES_deploy-all)
TAKES_endpoints := NAMESPACE
TAKES_pause-all := NAMESPACE
TAKES_smoke := MODEL NAMESPACE NAME URL
TAKES_pause := MODEL NAMESPACE NAME
TAKES_resume := MODEL NAMESPACE NAME TIMEOUT KEEP
TAKES_undeploy := MODEL NAMESPACE NAME DELETE_REPO YES
TAKES_canary := NAMESPACE TIMEOUT
TAKES_test := ARGS
TAKES_test-endpoint := ARGS
TAKES_test-page := PAGE_ARGS TOOLKIT
TAKES_bench := DEVICE MODELS
TAKES_fuzz := COUNT SEED KIND MEMORY_MB ONLY TOOLKIT
TAKES_soak := MINUTES SEED TOOLKIT

takes := $(sort $(foreach goal,$(MAKECMDGOALS),$(TAKES_$(goal))))

# Paths stand in the text of rules and recipes, so they have plain characters alone.
PATHS := PYTHON VENV BIN ENDPOINT_VENV DEPLOY_VENV
quoted = '$(subst ','\'',$(1))'
odd = $(word 2,x$(1)x)$(findstring !,$(shell printf %s $(call quoted,$(1)) | LC_ALL=C tr -c 'A-Za-z0-9_./+-' !))
$(foreach name,PYTHON $(filter $(PATHS),$(set)),$(if $(call odd,$($(name))),$(error $(name) is a path of letters, digits and _ . / + -)))

NEAREST := import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))
nearest = $(shell $(PYTHON) -c '$(NEAREST)' $(call quoted,$(1)) $(takes) 2>/dev/null)
unknown := $(filter-out $(takes) $(PATHS) OMP_WAIT_POLICY,$(given))
settings := $(filter API_TOKEN HF_TOKEN VAE_%,$(unknown))
$(if $(settings),$(error $(firstword $(settings)) is an environment variable: write it before make, as in `$(firstword $(settings))=... make $(MAKECMDGOALS)`))
meant := $(strip $(foreach name,$(unknown),$(call nearest,$(name))))
$(if $(unknown),$(error `make $(MAKECMDGOALS)` takes no $(unknown)$(if $(meant), (did you mean $(meant)?))$(if $(takes),; it takes $(takes))))

# Systems export NAME and HOST for themselves: they are ignored. Another one may be meant, and without DRY_RUN a plan would be a
# deployment: it is an error.
exported := $(strip $(foreach name,$(filter-out NAME HOST,$(takes)),$(if $(filter environment,$(origin $(name))),$(name))))
$(if $(exported),$(error the environment has $(exported), and is not read: write it after `make $(MAKECMDGOALS)`, or unset it))

# The options of a target's command: --min-replica="$MIN_REPLICA" for a value, --yes for YES=1; 0 and nothing are off
SWITCHES := DRY_RUN KEEP YES DELETE_REPO
option = --$(shell printf %s $(1) | tr A-Z_ a-z-)
word = $(if $(word 2,$($(1))),several,$($(1)))
switch = $(if $(filter 0,$(word)),,$(if $(filter 1,$(word)),$(option),$(error $(1)=$($(1)) is neither 1, for on, nor 0)))
options = $(strip $(foreach name,$(filter $(set),$(TAKES_$@)),\
	$(if $(filter $(name),$(SWITCHES)),$(call switch,$(name)),$(call option,$(name))="$$$(name)")))

# torch's threads on a CPU sleep while they wait for each other: spinning, they take the cores from whatever else runs
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.installed: requirements/dev.txt requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

$(ENDPOINT_VENV)/bin/.installed: requirements/toolkit-image.txt requirements.txt requirements/test.txt
	$(PYTHON) -m venv --clear $(ENDPOINT_VENV)
	$(ENDPOINT_VENV)/bin/python -m pip install -r requirements/toolkit-image.txt
	$(ENDPOINT_VENV)/bin/python -m pip install -r requirements.txt
	$(ENDPOINT_VENV)/bin/python -m pip install -r requirements/test.txt $$(grep ^numpy== requirements/toolkit-image.txt)
	@touch $@

$(DEPLOY_VENV)/bin/.installed: requirements/deploy.txt
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install --quiet -r requirements/deploy.txt
	@touch $@

.PHONY: install
install: $(BIN)/.installed  ## the .venv that the other targets use (newest releases), with the command remote-vae

.PHONY: demo
demo: install  ## a photograph through the tiny VAE over HTTP, into out/demo.png
	exec $(BIN)/python -m scripts.demo

.PHONY: serve
serve: install  ## serve MODEL [PORT=8000] [HOST=127.0.0.1] [WEIGHTS=dir|random] [DEVICE=cpu|cuda|mps] [DTYPE=...]
	exec $(BIN)/python -m scripts.serve $(options)

.PHONY: models
models: install  ## the table of models
	@$(BIN)/python -m scripts.models

# deploying needs neither torch nor the other environments
DEPLOY = @$(DEPLOY_VENV)/bin/python -m scripts.deploy $(1) $(options)

.PHONY: deploy
deploy: $(DEPLOY_VENV)/bin/.installed  ## an Inference Endpoint of MODEL [DRY_RUN=1] [ACCESS=public ...: docs/deploying.md]
	$(call DEPLOY,deploy)

.PHONY: deploy-all
deploy-all: $(DEPLOY_VENV)/bin/.installed  ## one of each published model [DRY_RUN=1]
	$(call DEPLOY,deploy --all)

.PHONY: endpoints
endpoints: $(DEPLOY_VENV)/bin/.installed  ## the table of your endpoints, and what they cost [NAMESPACE=...]
	$(call DEPLOY,endpoints)

.PHONY: smoke
smoke: $(DEPLOY_VENV)/bin/.installed  ## send a picture through the endpoint of MODEL, or through URL
	$(call DEPLOY,smoke)

.PHONY: pause
pause: $(DEPLOY_VENV)/bin/.installed  ## stop the endpoint of MODEL and its cost
	$(call DEPLOY,pause)

.PHONY: pause-all
pause-all: $(DEPLOY_VENV)/bin/.installed  ## stop every endpoint of this project [NAMESPACE=...]
	$(call DEPLOY,pause --all)

.PHONY: resume
resume: $(DEPLOY_VENV)/bin/.installed  ## start the paused endpoint of MODEL again
	$(call DEPLOY,resume)

.PHONY: undeploy
undeploy: $(DEPLOY_VENV)/bin/.installed  ## delete the endpoint of MODEL [DELETE_REPO=1] [YES=1]
	$(call DEPLOY,undeploy)

.PHONY: canary
canary: install  ## try the real platform for cents, with tiny [NAMESPACE=...] [TIMEOUT=30]
	$(BIN)/python -m scripts.canary $(options)

# A file of tests stays in one process, which starts the servers that they share. `make test ARGS="-k mp4"` runs some.
# Pytest reads the words from PYTEST_ADDOPTS and splits them itself, quotes included.
ARGS ?= -n 3 --dist loadfile
test test-endpoint: export PYTEST_ADDOPTS := $(value PYTEST_ADDOPTS) $(value ARGS)
test-page: export PYTEST_ADDOPTS := $(value PYTEST_ADDOPTS) $(value PAGE_ARGS)

.PHONY: test
test: install  ## the tests, with the newest releases
	$(BIN)/python -m pytest

.PHONY: test-quick
test-quick: install  ## those that start no server and take no seconds, in under a minute
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

.PHONY: test-endpoint
test-endpoint: $(ENDPOINT_VENV)/bin/.installed  ## the same tests with what the Inference Toolkit's image holds
	$(ENDPOINT_VENV)/bin/python -m pytest

# the page needs a browser, Debian's, and what drives it, which lies beside the environment that the tests run in
PAGE_PACKAGES := .venv-page
with_page = PYTHONPATH=$(PAGE_PACKAGES) $(BIN)/python

$(PAGE_PACKAGES)/.installed: requirements/page.txt $(BIN)/.installed
	rm -rf $(PAGE_PACKAGES)
	$(BIN)/python -m pip install --target $(PAGE_PACKAGES) -r requirements/page.txt
	@touch $@

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; } || \
		{ echo "error: the page is tested in chromium; as root: apt-get install chromium" >&2; exit 1; }

.PHONY: test-page
test-page: install $(PAGE_PACKAGES)/.installed chromium  ## the page at the endpoint's root, in Chromium [TOOLKIT=checkout]
	$(with_page) -m pytest tests/page

.PHONY: screenshots
screenshots: install $(PAGE_PACKAGES)/.installed chromium  ## the pictures of the page in docs/
	exec env $(with_page) -m scripts.screenshots

.PHONY: bench
bench: install  ## measure speed and memory into benchmarks/ [DEVICE=cpu|cuda] [MODELS=...]
	exec $(BIN)/python -m benchmarks.bench $(options)

# the toolkit runs with what its container holds
TRAFFIC_VENV := $(if $(filter TOOLKIT,$(set)),$(ENDPOINT_VENV),$(VENV))

.PHONY: fuzz
fuzz: $(TRAFFIC_VENV)/bin/.installed  ## malformed requests against servers here [COUNT=10000] [SEED=0] [KIND=files] [MEMORY_MB=2000] [ONLY=n] [TOOLKIT=checkout]
	exec $(TRAFFIC_VENV)/bin/python -m tests.fuzz $(options)

.PHONY: soak
soak: $(TRAFFIC_VENV)/bin/.installed  ## mixed traffic against tiny, into benchmarks/soak.md [MINUTES=10] [SEED=0] [TOOLKIT=checkout]
	exec $(TRAFFIC_VENV)/bin/python -m tests.soak $(options)

.PHONY: lint
lint: install  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

.PHONY: format
format: install  ## mend style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: train-tiny
train-tiny: install  ## train the embedded VAE again: one core with AMX for an hour
	$(BIN)/python -m pip download scipy==1.9.3 --no-deps --only-binary=:all: --python-version 3.10 \
		--platform manylinux_2_17_x86_64 -d out
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.train_tiny
