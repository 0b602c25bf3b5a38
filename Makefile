# make demo | test | lint | check | bench | chaos | soak. Each does its own set-up: .venv, pinned by constraints.txt.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test lint check bench chaos soak debian-packages
READY := .venv/ready
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0

demo: $(READY)
	@.venv/bin/python -m launch.demo

test: $(READY) debian-packages
	.venv/bin/pytest -n 2 --dist loadfile -rs

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

check: lint test  # what CI runs

bench: $(READY)
	for script in benchmarks/[a-z]*.py; do .venv/bin/python -m "benchmarks.$$(basename "$$script" .py)"; done

chaos: $(READY) debian-packages  # every fault of docs/faults.md; goes on where it was stopped
	.venv/bin/python -m tests.chaos
	.venv/bin/python -m tests.chaos --tests

soak: $(READY) debian-packages  # half an hour of training under faults on a real SLURM
	.venv/bin/python -m tests.cluster.soak $(SOAK)

$(READY): pyproject.toml constraints.txt
	@for python in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
	    ! "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null || break
	done
	"$$python" -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "Python 3.11 or later is needed: PYTHON=/path/to/python make $(MAKECMDGOALS)"; exit 2; }
	missing=
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=" $${python##*/}-venv"
	command -v c++ >/dev/null || missing+=" g++"
	if [ "$$missing" ]; then
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "missing:$$missing; install it, as with: sudo apt-get install$$missing"; exit 2; }
	    echo "installing$$missing"
	    $(APT) update
	    $(APT) install --no-install-recommends $$missing >/dev/null
	fi
	echo "installing packages into .venv: about 2 GB, once"
	"$$python" -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@

debian-packages:  # what only tests need: a SLURM of their own, and a browser to look at the data card
	@packages="$$(sed -n 's/^PACKAGES = "\(.*\)"$$/\1/p' tests/cluster/slurm.py) chromium"
	! dpkg -s $$packages >/dev/null 2>&1 || exit 0
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "some tests will be skipped: not all of $$packages are here, and no root to install it"; exit 0; }
	$(APT) update
	$(APT) install --no-install-recommends $$packages >/dev/null
