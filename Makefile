# `make` lists the targets. Each sets up what it needs in .venv.
PYTHON ?= python3

# Values on the command line are data: make does not expand them. Recipes get them in the environment, so no shell parses them.
overrides := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(foreach name,$(overrides) PYTHON,$(eval override $(name) := $$(value $(name))))
$(foreach name,$(overrides),$(eval export $(name)))

VENV := .venv
BIN := $(VENV)/bin
ENDPOINT_VENV := .venv-endpoint
DEPLOY_VENV := .venv-deploy
SOURCES := handler.py handlers models remote_vae clients scripts deploy benchmarks traffic tests

# scripts/make_options.py has the variables that each target takes. Any other variable is an error before a recipe runs.
quoted = '$(subst ','\'',$(1))'
checked = $(shell $(call quoted,$(PYTHON)) scripts/make_options.py $(call quoted,$(1)) $(call quoted,$(MAKECMDGOALS)) \
	$(foreach name,PYTHON $(filter-out PYTHON,$(overrides)),$(call quoted,$(name)=$($(name)))))
options = $(wordlist 2,99,$(call checked,$@))
verdict := $(call checked)
no_python = PYTHON=$(PYTHON) does not run: PYTHON is a path of letters, digits and _ . / + -
$(if $(filter ok,$(firstword $(verdict))),,$(error $(or $(strip $(patsubst error:,,$(verdict))),$(no_python))))

# torch's threads sleep while they wait for each other. By default they spin, and take the cores from other processes.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo serve models deploy deploy-all endpoints smoke pause pause-all resume undeploy canary \
	test test-quick test-endpoint chromium test-page debian-packages test-self-hosting image test-image lock screenshots \
	bench fuzz soak lint format train-tiny

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.installed: requirements/dev.txt requirements/serve.txt requirements/test.txt
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

install: $(BIN)/.installed  ## set up .venv with the newest releases and the command remote-vae

demo: install  ## send a photograph through the tiny VAE over HTTP, into out/demo.png
	exec $(BIN)/python -m scripts.demo

# Some shells set HOST to the name of the machine.
serve: install  ## serve MODEL [PORT=8000] [HOST=127.0.0.1] [WEIGHTS=folder|file|org/repo|random] [DEVICE=cpu|cuda|mps] [DTYPE=...]
	exec env -u HOST $(BIN)/python -m scripts.serve $(options)

models: install  ## list the models
	@$(BIN)/python -m scripts.models

# deploying needs neither torch nor the other environments
DEPLOY = @$(DEPLOY_VENV)/bin/python -m scripts.deploy

deploy: $(DEPLOY_VENV)/bin/.installed  ## create an Inference Endpoint for MODEL [DRY_RUN=1] [ACCESS=public ...: docs/deploying.md]
	$(DEPLOY) deploy $(options)

deploy-all: $(DEPLOY_VENV)/bin/.installed  ## create an endpoint for each published model [DRY_RUN=1]
	$(DEPLOY) deploy --all $(options)

endpoints: $(DEPLOY_VENV)/bin/.installed  ## list your endpoints and their cost [NAMESPACE=...]
	$(DEPLOY) endpoints $(options)

smoke: $(DEPLOY_VENV)/bin/.installed  ## send a test image through the endpoint of MODEL, or through URL
	$(DEPLOY) smoke $(options)

pause: $(DEPLOY_VENV)/bin/.installed  ## pause the endpoint of MODEL, which stops its cost
	$(DEPLOY) pause $(options)

pause-all: $(DEPLOY_VENV)/bin/.installed  ## pause every endpoint of this project [NAMESPACE=...]
	$(DEPLOY) pause --all $(options)

resume: $(DEPLOY_VENV)/bin/.installed  ## start the paused endpoint of MODEL again
	$(DEPLOY) resume $(options)

undeploy: $(DEPLOY_VENV)/bin/.installed  ## delete the endpoint of MODEL [DELETE_REPO=1] [YES=1]
	$(DEPLOY) undeploy $(options)

canary: install  ## test the real platform with tiny, for a few cents [NAMESPACE=...] [TIMEOUT=30]
	$(BIN)/python -m scripts.canary $(options)

# Neighboring tests share servers, so each process takes a row of them, and idle ones take from the others' ends.
# `make test ARGS="-k mp4"` runs some of them.
# Pytest reads the words from PYTEST_ADDOPTS and splits them itself, quotes included.
ARGS ?= -n 3 --dist worksteal
test test-endpoint: export PYTEST_ADDOPTS := $(value PYTEST_ADDOPTS) $(value ARGS)
test-page: export PYTEST_ADDOPTS := $(value PYTEST_ADDOPTS) $(value PAGE_ARGS)

test: install  ## run the tests with the newest releases
	$(BIN)/python -m pytest

test-quick: install  ## run the tests that start no server and take no seconds, in half a minute
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-endpoint: $(ENDPOINT_VENV)/bin/.installed  ## run the tests with the packages of the Inference Toolkit's image [TOOLKIT=checkout]
	$(ENDPOINT_VENV)/bin/python -m pytest

# The web demo is tested in Debian's Chromium. Playwright has a folder of its own beside .venv.
PAGE_PACKAGES := .venv-page
with_page = PYTHONPATH=$(PAGE_PACKAGES) $(BIN)/python

$(PAGE_PACKAGES)/.installed: requirements/page.txt $(BIN)/.installed
	rm -rf $(PAGE_PACKAGES)
	$(BIN)/python -m pip install --target $(PAGE_PACKAGES) -r requirements/page.txt
	@touch $@

chromium:
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; } || \
		{ echo "error: the web demo is tested in chromium; as root: apt-get install chromium" >&2; exit 1; }

test-page: install $(PAGE_PACKAGES)/.installed chromium  ## test the web demo in Chromium [TOOLKIT=checkout]
	$(with_page) -m pytest tests/page

debian-packages:
	@{ command -v haproxy && command -v systemd-analyze; } >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends haproxy systemd; } || \
		{ echo "error: deploy/ is tested with haproxy 2.6 or later and systemd-analyze; as root: apt-get install haproxy systemd" >&2; exit 1; }

test-self-hosting: install debian-packages  ## test two servers behind HAProxy, and the unit of systemd
	$(BIN)/python -m pytest tests/self_hosting

# docker or buildah get their own options as BUILD_ARGS, split into words like a shell does without quotes.
image:  ## build the container image with docker or buildah [TARGET=cpu|cuda] [TAG=remote-vae] [BUILD_ARGS=...]
	@exec scripts/build_image.sh --target "$${TARGET:-cpu}" --tag "$${TAG:-remote-vae}" $$BUILD_ARGS

test-image: install  ## test the container image TAG, by default remote-vae, which `make image` has built
	TAG="$${TAG:-remote-vae}" $(BIN)/python -m pytest tests/image

LOCK = $(BIN)/uv pip compile requirements/serve.txt --quiet --generate-hashes --no-annotate --upgrade \
	--custom-compile-command "make lock" --python-version 3.11 --python-platform x86_64-manylinux_2_28

lock: install  ## pin the newest packages for serving, with their hashes
	$(LOCK) --torch-backend cpu --output-file requirements/lock-cpu.txt
	$(LOCK) --output-file requirements/lock-cuda.txt

screenshots: install $(PAGE_PACKAGES)/.installed chromium  ## take the screenshots of the web demo in docs/
	exec env $(with_page) -m scripts.screenshots

$(BIN)/.bench: requirements/bench.txt $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/bench.txt
	@touch $@

bench: $(BIN)/.bench  ## measure speed and memory into benchmarks/ [DEVICE=cpu|cuda] [MODELS=...]
	exec $(BIN)/python -m benchmarks.bench $(options)

# The toolkit runs with the packages of its image.
TRAFFIC_VENV := $(if $(TOOLKIT),$(ENDPOINT_VENV),$(VENV))

fuzz: $(TRAFFIC_VENV)/bin/.installed  ## send malformed requests [COUNT=10000] [SEED=0] [KIND=files] [MEMORY_MB=2000] [ONLY=n] [TOOLKIT=checkout]
	exec $(TRAFFIC_VENV)/bin/python -m traffic fuzz $(options)

soak: $(TRAFFIC_VENV)/bin/.installed  ## send mixed traffic for minutes, into benchmarks/soak.md [MINUTES=10] [SEED=0] [TOOLKIT=checkout]
	exec $(TRAFFIC_VENV)/bin/python -m traffic soak $(options)

lint: install  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: install  ## correct style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

train-tiny: install  ## train the VAE in models/tiny again, which takes an hour of one core with AMX
	$(BIN)/python -m pip download scipy==1.9.3 --no-deps --only-binary=:all: --python-version 3.10 \
		--platform manylinux_2_17_x86_64 -d out
	OMP_NUM_THREADS=1 $(BIN)/python models/tiny/train.py
