# User commands. Each target first creates or updates .venv if it is missing or setup.cfg has changed.
PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
ADAPTER ?= checkpoints/tiny/adapter.safetensors
IMAGE ?= $(shell ls .venv/lib/python3*/site-packages/skimage/data/coffee.png)
MASK ?= docs/coffee_cup_mask.png
FORMAT ?= adapter
LAYERS ?= png
ARGS ?=
DEVICES ?=
KILLS ?= 50
RUN := .venv/bin/python
# Keeps glibc from returning every large buffer to the system and faulting in the next: a quarter of a step on a CPU.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000

.PHONY: train tiny decompose embed-prompt evaluate export ablation curves benchmark benchmark-data test test-kill audit lint clean help
.DEFAULT_GOAL := train

.venv/installed: setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version), expected 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: python3-venv)"; exit 2; }
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# Extras of setup.cfg. The matting baseline compiles itself on first use, which takes a minute.
.venv/installed-%: .venv/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

train: .venv/installed  ## adapts the tiny base: make train CONFIG=configs/flux_fill.yaml DEVICES=8 ARGS="name=mine optim.lr=1e-4"
	$(RUN) tools/train.py "config=$(CONFIG)" $(if $(DEVICES),train.devices=$(DEVICES)) $(ARGS)

# The whole chain from scratch. Stages whose weights exist are skipped, unfinished ones are resumed. ARGS apply to every
# stage; AUTOENCODER_ARGS, INPAINTER_ARGS, CONTINUE_ARGS, RGBA_ARGS, REFINE_ARGS, ADAPTER_ARGS and FURTHER_ARGS to one kind each.
TINY := checkpoints/tiny
# The last stage of both autoencoders trains only their decoders, by Muon; latents do not change.
REFINE := train.batch_size=16 train.steps=600 optim.lr=3e-3 optim.muon=true
# The base continues on new scenes, in smaller steps; so does its maskless counterpart.
CONTINUE := train.batch_size=32 train.steps=6000 train.validate_every=1000 optim.lr=2e-3 seed=1
# The shipped adapter is trained on more samples than the default one of `make train`, which takes a quarter of an hour.
FIRST := train.batch_size=128 train.steps=917 data.samples=12288 data.scenes.many_coloured_probability=0.35
# It then continues four times, each time on new scenes, with many small steps; the last three results are averaged.
FURTHER := optim.lr=2e-3 data.scenes.many_coloured_probability=0.35 sample.ensemble=9
# One such stage: name, previous stage, seed, steps, samples.
define further
$(RUN) tools/train.py config=configs/tiny.yaml name=$(1) adapter=runs/$(2)/adapter.safetensors seed=$(3) \
	train.steps=$(4) data.samples=$(5) $(FURTHER) $(ARGS) $(FURTHER_ARGS)
endef
ship = cp $(1) $@.partial && mv $@.partial $@
tiny: $(TINY)/adapter.safetensors  ## trains the tiny base, its autoencoders and its adapter from scratch

$(TINY)/autoencoder.safetensors: | .venv/installed
	$(RUN) tools/train.py config=configs/tiny_autoencoder.yaml $(ARGS) $(AUTOENCODER_ARGS)
	$(RUN) tools/train.py config=configs/tiny_autoencoder.yaml name=tiny_autoencoder_refined \
		refine=runs/tiny_autoencoder/autoencoder.safetensors noise=0.05 $(REFINE) $(ARGS) $(REFINE_ARGS)
	$(call ship,runs/tiny_autoencoder_refined/autoencoder.safetensors)

$(TINY)/transformer.safetensors: | $(TINY)/autoencoder.safetensors
	$(RUN) tools/train.py config=configs/tiny_inpainter.yaml $(ARGS) $(INPAINTER_ARGS)
	$(RUN) tools/train.py config=configs/tiny_inpainter.yaml name=tiny_inpainter_continued \
		transformer=runs/tiny_inpainter/transformer.safetensors $(CONTINUE) $(ARGS) $(CONTINUE_ARGS)
	$(call ship,runs/tiny_inpainter_continued/transformer.safetensors)

$(TINY)/rgba_autoencoder.safetensors: | $(TINY)/autoencoder.safetensors
	$(RUN) tools/train.py config=configs/tiny_rgba_autoencoder.yaml $(ARGS) $(RGBA_ARGS)
	$(RUN) tools/train.py config=configs/tiny_rgba_autoencoder.yaml name=tiny_rgba_autoencoder_refined extend=null \
		refine=runs/tiny_rgba_autoencoder/autoencoder.safetensors noise=0.2 $(REFINE) $(ARGS) $(REFINE_ARGS)
	$(call ship,runs/tiny_rgba_autoencoder_refined/autoencoder.safetensors)

$(TINY)/adapter.safetensors: | $(TINY)/transformer.safetensors $(TINY)/rgba_autoencoder.safetensors
	$(RUN) tools/train.py config=configs/tiny.yaml name=tiny_first $(FIRST) $(ARGS) $(ADAPTER_ARGS)
	$(call further,tiny_further,tiny_first,1,9000,12288)
	$(call further,tiny_third,tiny_further,2,11000,8192)
	$(call further,tiny_fourth,tiny_third,3,12000,8192)
	$(call further,tiny_fifth,tiny_fourth,4,12000,8192)
	$(RUN) tools/export.py \
		adapter=runs/tiny_third/adapter.safetensors,runs/tiny_fourth/adapter.safetensors,runs/tiny_fifth/adapter.safetensors \
		weights=0.2,0.35,0.45 rank=64 format=adapter out=runs/tiny_average.safetensors
	$(RUN) tools/evaluate.py adapter=runs/tiny_average.safetensors out=runs/tiny_average
	$(RUN) tools/export.py adapter=runs/tiny_average.safetensors figures=runs/tiny_average/metrics.json format=adapter out=$@

decompose: OUT ?= layers
decompose: .venv/installed $(if $(findstring psd,$(LAYERS)),.venv/installed-psd)  ## splits an image into layers: make decompose IMAGE=a.jpg MASK=a.png OUT=layers LAYERS=png,ora,psd
	$(RUN) tools/decompose.py "adapter=$(ADAPTER)" "image=$(IMAGE)" "mask=$(MASK)" "out=$(OUT)" "format=$(LAYERS)" $(ARGS)

embed-prompt: ROOT ?= checkpoints/flux1-fill-dev
embed-prompt: .venv/installed-text  ## computes the empty prompt's embedding with FLUX's text encoders in ROOT (once)
	$(RUN) tools/embed_prompt.py "root=$(ROOT)" $(ARGS)

evaluate: .venv/installed-matting  ## evaluates an adapter on 256 scenes; other methods: make evaluate ARGS="predictions=FOLDER data=FOLDER"
	$(RUN) tools/evaluate.py "adapter=$(ADAPTER)" out=runs/evaluate evaluate.samples=256 \
		"evaluate.rows=[adapted,base,classical,matting]" $(ARGS)

export: OUT ?= runs/exported.safetensors
export: .venv/installed  ## exports an adapter: make export ADAPTER=runs/tiny/adapter.safetensors FORMAT=merged OUT=merged.safetensors
	$(RUN) tools/export.py "adapter=$(ADAPTER)" format=$(FORMAT) "out=$(OUT)" $(ARGS)

# The image-to-image base for the ablation's row maskless-base, pre-trained like the inpainting base.
MASKLESS := $(TINY)/transformer_maskless.safetensors
$(MASKLESS): | $(TINY)/autoencoder.safetensors .venv/installed
	$(RUN) tools/train.py config=configs/tiny_inpainter.yaml conditioning.mask=false name=tiny_inpainter_maskless
	$(RUN) tools/train.py config=configs/tiny_inpainter.yaml conditioning.mask=false name=tiny_inpainter_maskless_continued \
		transformer=runs/tiny_inpainter_maskless/transformer.safetensors $(CONTINUE)
	$(call ship,runs/tiny_inpainter_maskless_continued/transformer.safetensors)

ablation: .venv/installed-plots $(MASKLESS)  ## runs the paper's ablation: make ablation ARGS="train.steps=50 evaluate.samples=8"
	$(RUN) tools/ablate.py config=configs/ablation.yaml $(ARGS)

curves: .venv/installed-plots  ## measures quality against training steps and distinct training samples
	$(RUN) tools/ablate.py config=configs/curves.yaml $(ARGS)

benchmark-data: .venv/installed  ## measures triplets per second: make benchmark-data ARGS="layered=[data/mulan.safetensors]"
	$(RUN) tools/benchmark_data.py $(ARGS)

benchmark: .venv/installed  ## counts operations and measures speed: make benchmark ARGS="device=cuda recompute=1"
	$(RUN) tools/benchmark.py $(ARGS)

test: .venv/installed-dev  ## runs the tests: make test ARGS="tests/test_flow.py"
	$(RUN) -m pytest $(ARGS)

test-kill: .venv/installed-dev  ## checks that a run killed fifty times ends with the same weights as an uninterrupted one
	KILLS=$(KILLS) $(RUN) -m pytest -s tests/test_kill.py $(ARGS)

audit: .venv/installed-dev  ## checks installed packages for known vulnerabilities; fails on packages that cannot be looked up
	$(RUN) -m pip freeze --exclude-editable > .venv/audited.txt
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r .venv/audited.txt $(ARGS) || \
		{ echo "error: a known vulnerability, or a package that could not be looked up (see above; it asks https://pypi.org)"; exit 1; }

lint: .venv/installed-dev  ## checks style and types
	$(RUN) -m ruff check layerdecomp tools tests
	$(RUN) -m ruff format --check layerdecomp tools tests
	$(RUN) -m mypy

clean:  ## removes .venv; keeps runs/
	rm -rf .venv

help:  ## prints this list; python tools/NAME.py --help prints a tool's usage
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' Makefile
