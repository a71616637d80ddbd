#!/usr/bin/env bash
# Test every model family from source to result with one version of transformers, and write the table of results. Takes some minutes.
# Usage: tools/families.sh [TRANSFORMERS_VERSION]      (default: the installed version)
# A version that is given is installed in a virtual environment of its own.
[ $# -eq 0 ] || export CBQSTREAM_VENV=${CBQSTREAM_VENV:-.venv}-transformers-$1
. "$(dirname "$0")/setup.sh" test
[ $# -eq 0 ] || "$venv/bin/pip" install --quiet --disable-pip-version-check "transformers==$1"
version=$("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')
mkdir -p build
code=0
CBQSTREAM_FAMILIES=all "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 tests/families tests/integration/test_smoothing.py --junitxml "build/families-$version.xml" || code=$?
"$venv/bin/python" tests/families/page.py "build/families-$version.xml" "$version" tests/families/README.md
exit $code
