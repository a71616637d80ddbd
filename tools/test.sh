#!/usr/bin/env bash
# Install the project with its test dependencies into a virtual environment, and run all checks: format, lint, types, tests.
# Usage: tools/test.sh [PYTEST ARGUMENTS]
. "$(dirname "$0")/setup.sh" test
export CBQSTREAM_TEST_MODEL=$PWD/$model
case $models in /*) export CBQSTREAM_TEST_MODEL=$model ;; esac
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
# Every test uses one thread, so one test runs on each core.
"$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 "$@"
