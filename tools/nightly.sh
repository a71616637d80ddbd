#!/usr/bin/env bash
# The fault-injection suite with all its counts (about an hour and a half on one core), and the page that says what came of it.
# Usage: tools/nightly.sh [PYTEST ARGUMENTS]
# Counts are kept in build/fault-tally.jsonl. With arguments, such as --last-failed, some tests are run again and their counts replaced.
. "$(dirname "$0")/setup.sh" test
tally=$PWD/build/fault-tally.jsonl
mkdir -p build
[ $# -gt 0 ] || rm -f "$tally"
CBQSTREAM_NIGHTLY=1 CBQSTREAM_FAULT_TALLY=$tally "$venv/bin/python" -m pytest tests/faults "$@"
"$venv/bin/python" tests/faults/page.py "$tally" tests/faults/README.md
