# `make demo`: environment, then points on a clip.   `make test`: environment, then the tests.
PYTHON ?= python3
PY = .venv/bin/python

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo, for example")'
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: demo test
demo: .venv/installed
	$(PY) infer.py assets/cups.mp4 "point to the cups"

test: .venv/installed
	$(PY) -m pytest -q tests
