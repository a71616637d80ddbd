#!/usr/bin/env bash
# Every family from source to result, under one version of transformers, and the table of what came of it (some minutes).
# Usage: tools/families.sh [TRANSFORMERS_VERSION]; by default the one that is installed. Another one gets a virtual environment of its own.
[ $# -eq 0 ] || export CBQSTREAM_VENV=${CBQSTREAM_VENV:-.venv}-transformers-$1
. "$(dirname "$0")/setup.sh" test
[ $# -eq 0 ] || "$venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$1"
version=$("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')
mkdir -p build
code=0
CBQSTREAM_FAMILIES=all "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 tests/families tests/integration/test_folding.py --junitxml "build/families-$version.xml" || code=$?
"$venv/bin/python" tests/families/page.py "build/families-$version.xml" "$version" tests/families/README.md
exit $code
