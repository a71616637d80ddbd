#!/usr/bin/env bash
# Run the complete fault-injection tests, try all architectures of transformers and published models, and write the pages with their results.
# Takes about two hours on one core.
# Usage: tools/nightly.sh [PYTEST ARGUMENTS]
# Counts are stored in build/fault-tally.jsonl. With arguments, such as --last-failed, only some tests run, and their counts are replaced.
# Results of architectures and of published models are stored in build/*.jsonl, and they are tried only without arguments.
. "$(dirname "$0")/setup.sh" test
tally=$PWD/build/fault-tally.jsonl
mkdir -p build
[ $# -gt 0 ] || rm -f "$tally"
CBQSTREAM_NIGHTLY=1 CBQSTREAM_FAULT_TALLY=$tally "$venv/bin/python" -m pytest tests/faults "$@"
"$venv/bin/python" tests/faults/page.py "$tally" tests/faults/README.md
[ $# -eq 0 ] || exit 0
version=$("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')
code=0
for tool in architectures published; do
    results=build/$tool.jsonl
    rm -f "$results"
    "$venv/bin/python" "tools/$tool.py" "$results" || code=$?
    "$venv/bin/python" tests/families/page.py "$results" "$version" tests/families/README.md
done
exit $code
