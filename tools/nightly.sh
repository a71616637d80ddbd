#!/usr/bin/env bash
# Run the complete fault-injection tests, and write the page with their counts. Takes about an hour and a half on one core.
# Usage: tools/nightly.sh [PYTEST ARGUMENTS]
# Counts are stored in build/fault-tally.jsonl. With arguments, such as --last-failed, only some tests run, and their counts are replaced.
. "$(dirname "$0")/setup.sh" test
tally=$PWD/build/fault-tally.jsonl
mkdir -p build
[ $# -gt 0 ] || rm -f "$tally"
CBQSTREAM_NIGHTLY=1 CBQSTREAM_FAULT_TALLY=$tally "$venv/bin/python" -m pytest tests/faults "$@"
"$venv/bin/python" tests/faults/page.py "$tally" tests/faults/README.md
